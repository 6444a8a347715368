"""A short run of the proof of kills (scripts/prove kills): two routers and two backends on one Postgres and one S3."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_what_a_fleet_acknowledged_stays_whoever_is_killed():
    if not list(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no Postgres below /usr/lib/postgresql: install the package postgresql")
    command = [sys.executable, "scripts/prove_many.py", "kills", "4", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
