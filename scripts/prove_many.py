"""Two routers and two backends on one Postgres and one S3 while any of them is killed or frozen, sometimes several at once, and a
ledger outside of everything that was acknowledged (prove_ledger.py). `chaos-fleet` also cuts and holds their connections and moves
their clocks. Needs the package postgresql, and faketime for clocks. Standard library only. See scripts/prove.

usage: prove_many.py kills N SEED | chaos-fleet SECONDS SEED
"""
import collections
import contextlib
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

import prove_ledger
from prove_ledger import ADMIN, Client, Ledger, Peers
from prove_pieces import FAKETIME, Bucket, Postgres, Proxy, Tandem, wait_for

# A job's lease (router/store): who sleeps longer has lost it.
LEASE_S = 15


class Fleet:
    """Whoever ends is started again after a moment, as by a supervisor."""

    def __init__(self, root, with_proxies):
        self.root, self.clocks = root, root / "clocks"
        self.clocks.mkdir()
        self.outside = root / "adapters"
        self.outside.mkdir()
        self.postgres, self.bucket = Postgres(), Bucket(root / "s3")
        environment = {**self.bucket.environment, "TMPDIR": str(root)}

        def place(name, arguments):
            more = {}
            if with_proxies and FAKETIME:
                (self.clocks / name).write_text("+0")
                more = {"LD_PRELOAD": str(FAKETIME[-1]), "FAKETIME_TIMESTAMP_FILE": str(self.clocks / name), "FAKETIME_CACHE_DURATION": "1",
                        "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            process = Tandem(root, name, lambda port: [*arguments(port), "--data-dir", str(root / name), "--artifact-url", self.bucket.url],
                             environment | more)
            wait_for(name, process.is_up)
            return process, Proxy(process.port) if with_proxies else process

        backends = [place(f"backend-{i}", lambda port: ["backend", "--listen", f"127.0.0.1:{port}", "--threads", "1",
                                                        "--kv-cache-memory-bytes", "64M"]) for i in range(2)]
        urls = ",".join(way.base for _, way in backends)
        routers = [place(f"router-{i}", lambda port: ["router", "--port", str(port), "--backend", urls, "--api-key", ADMIN,
                                                      "--database-url", self.postgres.url, "--lora-root", str(self.outside)])
                   for i in range(2)]
        self.routers, self.backends = [process for process, _ in routers], [process for process, _ in backends]
        self.tandems = self.routers + self.backends
        self.proxies = [way for _, way in routers + backends] if with_proxies else []
        ways = [way for _, way in routers]
        self.client = Client(lambda: [way.base for way in ways], root / "s3/objects/tandem/adapters", ["--database-url", self.postgres.url])
        self.ends, self.killed, self.closing = collections.Counter(), set(), threading.Event()
        self.rng = random.Random(1)
        self.supervisor = threading.Thread(target=self.supervise, daemon=True)
        self.supervisor.start()

    def supervise(self):
        due = {}
        while not self.closing.wait(0.05):
            for tandem in self.tandems:
                if tandem.process.poll() is None:
                    continue
                if tandem not in due:
                    due[tandem] = time.monotonic() + self.rng.uniform(0, 2)
                    if tandem.process.returncode != -9:
                        self.ends[f"{tandem.name} ended itself with {tandem.process.returncode}"] += 1
                elif time.monotonic() > due[tandem]:
                    del due[tandem]
                    tandem.begin()

    def are_up(self):
        with contextlib.suppress(prove_ledger.Away):
            return all(tandem.is_up() for tandem in self.tandems) and all(self.client.call("GET", "/ready")[0] == 200 for _ in range(8))
        return False

    def close(self):
        self.closing.set()
        self.supervisor.join()
        for piece in (*self.tandems, self.postgres, self.bucket):
            piece.kill()
        self.postgres.close()


class Faults:
    def __init__(self, fleet, rng):
        self.fleet, self.rng, self.kills = fleet, rng, 0

    def moment(self):
        return self.rng.uniform(0.3, 3)

    def kill_all_of(self, tandems):
        for tandem in tandems:
            tandem.kill()
        self.kills += 1

    def kill_a_router(self):
        self.kill_all_of([self.rng.choice(self.fleet.routers)])

    def kill_a_backend(self):
        self.kill_all_of([self.rng.choice(self.fleet.backends)])

    def kill_both_routers(self):
        self.kill_all_of(self.fleet.routers)

    def kill_both_backends(self):
        self.kill_all_of(self.fleet.backends)

    def kill_all_four(self):
        self.kill_all_of(self.fleet.tandems)

    def kill_postgres(self):
        self.fleet.postgres.kill()
        time.sleep(self.moment())
        self.fleet.postgres.begin()

    def kill_s3(self):
        self.fleet.bucket.kill()
        time.sleep(self.moment())
        self.fleet.bucket.begin()

    def freeze_postgres(self):
        self.fleet.postgres.freeze(self.moment())

    def freeze_s3(self):
        self.fleet.bucket.freeze(self.moment())

    def freeze_one(self):
        self.rng.choice(self.fleet.tandems).freeze(self.moment())

    def freeze_a_router_beyond_its_leases(self):
        self.rng.choice(self.fleet.routers).freeze(LEASE_S + self.moment())

    def cut(self):
        for proxy in self.rng.sample(self.fleet.proxies, self.rng.randrange(1, 5)):
            proxy.cut()

    def hold(self):
        self.rng.choice(self.fleet.proxies).hold(self.rng.uniform(0.5, 6))

    def move_a_clock(self):
        """By hours, of one process; it stays there. Any two are closer than the 24 hours of a batch."""
        clock = self.fleet.clocks / self.rng.choice(self.fleet.tandems).name
        aside = clock.with_suffix(".new")
        aside.write_text(f"{self.rng.choice((-9, -5, -1, 1, 5, 9)) * 3600:+}")
        os.replace(aside, clock)

    KILLS = [kill_a_router] * 4 + [kill_a_backend] * 4 + [kill_both_routers, kill_both_backends, kill_all_four]
    PIECES = [kill_postgres, kill_s3, freeze_postgres, freeze_s3, freeze_one]


def kills(faults, n):
    """N kills, after every third of which a piece breaks, in the middle of what the kill left."""
    while faults.kills < n:
        yield faults.rng.choice(Faults.KILLS)
        if faults.rng.random() < 0.3:
            yield faults.rng.choice(Faults.PIECES)
        if faults.rng.random() < 0.03:
            yield Faults.freeze_a_router_beyond_its_leases


def chaos(faults, seconds):
    """Whatever there is, so long."""
    clocks = [Faults.move_a_clock] * 3 if FAKETIME else []
    if not clocks:
        print("no faketime (the package of this name): no clock is moved")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield faults.rng.choice(Faults.KILLS[3:6] + Faults.PIECES + [Faults.cut] * 3 + [Faults.hold] * 2 + clocks)


def main(plan, amount, seed):
    rng, ledger, broke = random.Random(seed), Ledger(), collections.Counter()
    with tempfile.TemporaryDirectory(prefix="tandem-many-") as root:
        root = pathlib.Path(root)
        fleet = Fleet(root, with_proxies=plan is chaos)
        try:
            wait_for("the fleet", fleet.are_up)
            expected, folders, made = prove_ledger.undisturbed(fleet.client, fleet.outside)
            prove_ledger.first_names(fleet.client, ledger, folders)
            peers, faults = Peers(fleet.client, ledger, expected, folders, seed, pause=0.1), Faults(fleet, rng)
            began = time.monotonic()
            for fault in plan(faults, amount):
                fault(faults)
                broke[fault.__name__] += 1
                time.sleep(rng.uniform(0.2, 4))
            peers.stop()
            print(f"broken for {time.monotonic() - began:.0f} s: " + ", ".join(f"{name} {n}" for name, n in sorted(broke.items())))
            print("heard:", ", ".join(f"{what} {n}" for what, n in sorted(ledger.counts.items())), flush=True)
            for clock in fleet.clocks.iterdir():
                clock.write_text("+0")
            wait_for("the fleet, again", fleet.are_up, 120)
            began = time.monotonic()
            problems = list(prove_ledger.judge(fleet.client, ledger, expected, made))
            print(f"kept: {ledger}; all of it seen {time.monotonic() - began:.0f} s after the last fault")
            print("starts:", ", ".join(f"{tandem.name} {tandem.starts}" for tandem in fleet.tandems),
                  "".join(f"; {what} {n} times" for what, n in sorted(fleet.ends.items())))
            for tandem in fleet.tandems:
                if n := tandem.said("panicked"):
                    problems.append(f"{tandem.name} panicked {n} times")
        finally:
            fleet.close()
            if os.environ.get("PROVE_KEEP_LOGS"):
                for tandem in fleet.tandems:
                    (pathlib.Path(os.environ["PROVE_KEEP_LOGS"]) / tandem.log.name).write_bytes(tandem.log.read_bytes())
    for problem in problems[:30]:
        print("  ", problem)
    return not problems and len(ledger.jobs) > 0


if __name__ == "__main__":
    plans = {"kills": kills, "chaos-fleet": chaos}
    if len(sys.argv) != 4 or sys.argv[1] not in plans:
        raise SystemExit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, too
    held = main(plans[sys.argv[1]], float(sys.argv[2]), int(sys.argv[3]))
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
