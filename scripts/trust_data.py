"""Data: what once lost or damaged it. See prove_trust.py."""
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time

from prove import QUESTIONS, TANDEM
from prove_ledger import chat
from trust_server import ITEMS, adapter, counted, demand, end_of, filled, item, job_of, serving, words


@item("start on a lost database", "adapters 5 -> 0, files 2 -> 0")
def lost_database():
    with serving() as server:
        filled(server)
        before = counted(server)
        server.end(signal.SIGKILL)
        for file in server.data.glob("tandem.db*"):
            file.unlink()
        said = server.refuses_to_start()
        demand(counted(server) == before, "files and adapters", before, counted(server))
        server.options.append("--quarantine-strays")
        server.begin()
        moved = [path for path in (server.data / "quarantine").rglob("*") if path.is_file()]
        demand(len(moved) >= 3, moved)
        return f"{said}; all {sum(before)} are there; with --quarantine-strays they move to quarantine/"


@item("a database copied without its -wal", "adapters 5 -> 0, files 2 -> 0")
def database_without_wal():
    with serving() as server:
        shutil.copy(server.data / "tandem.db", server.folder / "old.db")
        filled(server)
        before = counted(server)
        server.end(signal.SIGKILL)
        for file in server.data.glob("tandem.db*"):
            file.unlink()
        shutil.copy(server.folder / "old.db", server.data / "tandem.db")
        said = server.refuses_to_start()
        demand(counted(server) == before, counted(server))
        return f"{said}; all {sum(before)} are there"


@item("tandem backup and restore, of a server at work", "there was none")
def backup():
    with serving() as server:
        filled(server)
        text = server.client.ask("one", QUESTIONS[0])
        for command in (["backup", "--data-dir", server.data, server.folder / "copy"],
                        ["restore", "--data-dir", server.folder / "again/data", server.folder / "copy"]):
            done = subprocess.run([TANDEM, *command], capture_output=True, text=True)
            demand(done.returncode == 0, command[0], done.stderr[-300:])
        server.end(signal.SIGKILL)
        server.data = server.folder / "again/data"
        server.begin()
        demand(server.client.ask("one", QUESTIONS[0]) == text and counted(server) == (1, 1), "other answers")
        return "the copy answers the same, 1 file and 1 adapter are there"


def disturbed(name, damage):
    """A job that is killed, has a file damaged, and goes on."""
    settings = {"max_steps": 60, "save_steps": 5, "learning_rate": 1e-3, "batch_size": 2}
    with serving() as server:
        expected = server.client.bytes_of(end_of(server, job_of(server, **settings)))
        job = job_of(server, **settings)
        files = server.data / "jobs" / job
        while not list(files.glob("life-*/state.safetensors")):
            time.sleep(0.005)
        server.end(signal.SIGKILL)
        found = sorted(files.glob(name))
        for file in found:
            content = bytearray(file.read_bytes())
            file.write_bytes(damage(content))
        server.begin()
        state = end_of(server, job)
        demand(state["status"] == "succeeded" and server.client.bytes_of(state) == expected, state["status"], state["error"])
        said = [line.split("WARN ")[1][:110] for line in server.said().splitlines() if "WARN " in line and ("damaged" in line or "again" in line)]
        demand(said, "nothing was noticed")
        return f"noticed ({said[0]}); the job ends with the undisturbed bytes"


def flip(content):
    content[len(content) // 2] ^= 1
    return content


ITEMS += [
    ("one flipped byte in state.safetensors", "unnoticed", lambda: disturbed("life-*/state.safetensors", flip)),
    ("one flipped byte in train.tokens", "unnoticed", lambda: disturbed("train.tokens", flip)),
    ("state.safetensors cut in half", "the job failed for good", lambda: disturbed("life-*/state.safetensors", lambda c: c[: len(c) // 2])),
]


@item("a corrupt SQLite", "\"pool timed out\"")
def corrupt_sqlite():
    with serving() as server:
        filled(server)
        server.end()
        database = server.data / "tandem.db"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray(database.read_bytes())
        content[4096 * 5:4096 * 8] = os.urandom(4096 * 3)
        database.write_bytes(content)
        return server.refuses_to_start()


@item("a job that diverges (lr 1, alpha 1e6, one step)", "published, its requests 500; its first checkpoint stays a model")
def diverges():
    with serving() as server:
        state = end_of(server, job_of(server, learning_rate=1, lora_alpha=1e6, max_steps=1, save_steps=1, batch_size=1))
        models = json.loads(server.call("GET", "/v1/models")[1])["data"]
        if state["status"] == "succeeded":
            status = server.call("POST", "/v1/chat/completions", chat(state["fine_tuned_model"], QUESTIONS[0]))[0]
            demand(status == 200, "published, and answers", status)
            return "succeeded, and its model answers 200"
        demand(len(models) == 1, [model["id"] for model in models])
        return f"{state['status']}: {state['error']['message']}; no model, no checkpoint"


@item("lora_alpha: 1e39", "loaded")
def endless_alpha():
    with serving() as server:
        folder = adapter(server.folder / "one")
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 1e39}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        answer = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": str(folder)})
        demand(answer[0] == 400, answer[:2])
        return words(answer)
