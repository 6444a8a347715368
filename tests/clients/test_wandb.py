"""An offline W&B run that `tandem train` wrote, sent by the real `wandb sync` to a stand-in for W&B's server."""

import gzip
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

from conftest import ROOT

TANDEM = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")


class Server(http.server.ThreadingHTTPServer):
    """Says to everything what the client waits for, and keeps what it sends of runs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upserts, self.rows, self.ended = [], {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        body = self.body()
        if self.path == "/graphql":
            return self.graphql(json.loads(body))
        if run := re.fullmatch(r"/files/.*/([^/]+)/file_stream", self.path):
            sent = json.loads(body)
            history = sent.get("files", {}).get("wandb-history.jsonl", {"content": []})
            rows = self.server.rows.setdefault(run[1], [])
            rows += [json.loads(line) for line in history["content"]]
            if sent.get("complete"):
                self.server.ended.append(sent["exitcode"])
        self.answer({"limits": {}})

    def graphql(self, asked):
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        given = asked.get("variables") or {}
        if name == "UpsertBucket":
            self.server.upserts.append(given)
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"], "config": "{}", "project": project,
                      "description": "", "sweepName": None, "historyLineCount": 0}
            return self.answer({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/upload"} for file in given["files"]]
            return self.answer({"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}})
        self.answer({"data": {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}})


def command(folder, *more):
    settings = [f"output_dir={folder}", "seed=1", "report_to=wandb", "wandb_project=pets", "run_name=first try", *more]
    return [TANDEM, "train", ROOT / "server/demo/recipe.yaml", *settings]


def train(folder, *more):
    return subprocess.run(command(folder, *more), cwd=ROOT, check=True, capture_output=True, text=True)


def sync(run, server, home):
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"}
    wandb = pathlib.Path(sys.executable).parent / "wandb"
    return subprocess.run([wandb, "sync", run], env=environment, cwd=home, check=True, capture_output=True, text=True, timeout=120)


def test_an_offline_run_is_sent_by_the_real_client(tmp_path):
    out = tmp_path / "out"
    train(out, "max_steps=150", "batch_size=1", "gradient_accumulation_steps=1")
    [run] = (out / "wandb").glob("offline-run-*")
    [file] = run.glob("run-*.wandb")
    assert file.stat().st_size > 3 * 32768, "records reach over blocks"
    server = Server()
    sync(run, server, tmp_path)
    first = server.upserts[0]
    assert (first["project"], first["displayName"], first["name"]) == ("pets", "first try", file.stem.removeprefix("run-"))
    config = json.loads(first["config"])
    assert config["seed"]["value"] == 1 and config["max_steps"]["value"] == 150, config
    rows = server.rows[first["name"]]
    reports = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(reports) >= 150
    for number, (row, report) in enumerate(zip(rows, reports)):
        assert (row["_step"], row["train/global_step"]) == (number, report["step"])
        for name, value in report.items():
            if name != "step":
                tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                assert row[tag] == value, (number, name)
    assert server.ended == [0]


def test_a_run_that_goes_on_is_the_same_run(tmp_path):
    out = tmp_path / "out"
    settings = ["max_steps=60", "batch_size=1"]
    process = subprocess.Popen(command(out, *settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (lines := out / "metrics.jsonl").exists() or len(lines.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    time.sleep(1)  # folders are told apart by their second
    train(out, *settings)
    first, second = sorted((out / "wandb").glob("offline-run-*"))
    assert first.name[-8:] == second.name[-8:], "one id"
    server = Server()
    sync(first, server, tmp_path)
    assert server.ended == [1], "it did not end well, yet"
    sync(second, server, tmp_path)
    rows = server.rows[first.name[-8:]]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == list(range(1, 61))
    assert server.ended == [1, 0]
    # What an earlier run left goes where that is asked.
    train(out, *settings, "overwrite_output_dir=true")
    [new] = (out / "wandb").glob("offline-run-*")
    assert new.name[-8:] != first.name[-8:]
