"""docs/clients.md says which client does what: by tests that there are, with versions that are installed."""

import ast
import importlib.metadata
import re

from conftest import ROOT

HERE = ROOT / "tests/clients"
# What is installed beside clients.
TOOLS = {"jsonschema", "numpy", "pytest"}


def pinned(name):
    lines = (line.split("#")[0].strip() for line in (HERE / name).read_text().splitlines())
    return {re.sub(r"\[.*\]", "", package): version for package, version in (line.split("==") for line in lines if line)}


def functions_of(file):
    nodes = ast.parse((HERE / file).read_text()).body
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_the_table_of_clients():
    today, legacy = pinned("requirements.txt"), pinned("requirements-legacy.txt")
    text = (ROOT / "docs/clients.md").read_text()
    rows = re.findall(r"^\| (\S+) (\d\S*) \| [^|]+ \| `(test_\w+\.py)`: ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) == text.count("| `test_"), "a row that cannot be read"
    for client, version, file, tests in rows:
        assert version == (legacy if "legacy" in file else today)[client], client
        named = set(re.findall(r"`(\w+)`", tests))
        assert named and named <= functions_of(file), (client, named - functions_of(file))
    assert {client for client, *_ in rows} == (set(today) | set(legacy)) - TOOLS
    # In this environment the clients of today are what runs.
    for package, version in today.items():
        assert importlib.metadata.version(package) == version, package
