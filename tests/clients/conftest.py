"""The real binary on a free port, for the tests of the real clients."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The URL of a server of its own."""
    binary = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")
    folder = tmp_path_factory.mktemp("tandem")
    model = os.environ.get("TANDEM_TEST_MODEL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    command = [str(binary), "serve", "--port", "0", "--data-dir", str(folder / "data")]
    command += ["--model", model] if model else []
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    line = process.stdout.readline()
    assert "listening on" in line, (folder / "log").read_text()
    yield line.split()[-1]
    process.terminate()
    assert process.wait(timeout=60) == 0, (folder / "log").read_text()


@pytest.fixture(scope="session")
def training_file(tmp_path_factory):
    """Prompt and completion rows, in a file whose name is not ASCII."""
    path = tmp_path_factory.mktemp("data") / "données été.jsonl"
    rows = ['{"prompt": "Question %d: ", "completion": " the answer is blue."}\n' % i for i in range(8)]
    path.write_text("".join(rows), encoding="utf-8")
    return path
