"""The smallest input of each hole that was found once in a server, against the server of now, and what comes of it; as lines of a table. What
takes no process (types that cannot be forged, tables) is a test's. Standard library only; root for the full disk.

usage: prove_trust.py [WORDS]    the items whose name has them, or all
"""
import re
import subprocess
import sys

from prove_ledger import Away
from trust_server import ITEMS, Wrong
import trust_data  # noqa: F401 (each puts its items on the list)
import trust_load  # noqa: F401
import trust_rights  # noqa: F401


def main(wanted):
    failed = 0
    print("| item | before | now | |\n|---|---|---|---|")
    for name, before, do in ITEMS:
        if wanted not in name:
            continue
        try:
            now, mark = do(), "holds"
        except (Wrong, Away, SystemExit, subprocess.TimeoutExpired, StopIteration) as error:
            now, mark, failed = repr(error)[:300], "DOES NOT HOLD", failed + 1
        now = re.sub(r"/tmp/tandem-trust-\w+", "DIR", " ".join(now.split()).replace("|", "/"))
        print(f"| {name} | {before} | {now} | {mark} |", flush=True)
    print(f"\n{failed} of {len(ITEMS)} do not hold" if not wanted else "")
    return not failed


if __name__ == "__main__":
    sys.exit(0 if main(" ".join(sys.argv[1:])) else 1)
