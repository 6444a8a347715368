"""The smallest inputs that once lost, stopped or showed something (scripts/prove trust), against the server of now."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import prove_trust  # noqa: E402



@pytest.mark.parametrize("name", [name for name, _, _ in prove_trust.ITEMS])
def test_it_holds(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert next(do for known, _, do in prove_trust.ITEMS if known == name)()
