"""The real binary on a free port, for the tests of the real clients."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Process:
    """`tandem COMMAND...`; `url` is where it listens."""

    def __init__(self, folder, *command):
        binary = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
        self.log = folder / f"{command[0]}.log"
        command = [str(binary), *command, "--data-dir", str(folder / "data")]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        line = self.process.stdout.readline()
        assert "listening on" in line, self.log.read_text()
        self.url = line.split()[-1]

    def end(self):
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0, self.log.read_text()


@pytest.fixture(scope="session", params=["serve", "router"])
def server(request, tmp_path_factory):
    """The URL of a server of its own: all in one process, and a router in front of a backend."""
    folder = tmp_path_factory.mktemp("tandem")
    model = os.environ.get("TANDEM_TEST_MODEL")
    model = ["--model", model] if model else []
    # Whatever a test has below its own folder may be loaded.
    edge = ["--port", "0", "--lora-root", str(tmp_path_factory.getbasetemp())]
    if request.param == "serve":
        processes = [Process(folder, "serve", *edge, *model)]
    else:
        backend = Process(folder, "backend", "--listen", "127.0.0.1:0", *model)
        processes = [Process(folder, "router", *edge, "--backend", backend.url), backend]
    yield processes[0].url
    for process in processes:
        process.end()


@pytest.fixture(scope="session")
def training_file(tmp_path_factory):
    """Prompt and completion rows, in a file whose name is not ASCII."""
    path = tmp_path_factory.mktemp("data") / "données été.jsonl"
    rows = ['{"prompt": "Question %d: ", "completion": " the answer is blue."}\n' % i for i in range(8)]
    path.write_text("".join(rows), encoding="utf-8")
    return path
