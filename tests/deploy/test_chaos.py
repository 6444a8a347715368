"""A short run of the chaos proof (scripts/prove chaos): what was acknowledged stays, whatever breaks."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_what_was_acknowledged_stays_whatever_breaks():
    command = [sys.executable, "scripts/prove_chaos.py", "40", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
