"""What a fleet of servers stands on, to be killed, frozen and cut: a Postgres (the package postgresql), an S3 server, and TCP
proxies. Standard library only."""
import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

TANDEM = os.environ.get("PROVE_BINARY", "target/release/tandem")
# Moves a process's wall clock by what a file says.
FAKETIME = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_for(what, ready, seconds=60):
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise SystemExit(f"{what}: not within {seconds} s")
        time.sleep(0.02)


class Process:
    """A process with its children, and how to start it again."""

    def __init__(self, name, command, **options):
        self.name, self.command, self.options = name, command, options
        self.begin()

    def begin(self):
        self.process = subprocess.Popen(self.command, **self.options)

    def pids(self):
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        with contextlib.suppress(OSError):
            return [pid, *map(int, children.read_text().split())]
        return [pid]

    def signal(self, number):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()

    close = kill

    def freeze(self, seconds):
        self.signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.signal(signal.SIGCONT)


class Postgres(Process):
    def __init__(self):
        found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            raise SystemExit("no /usr/lib/postgresql/*/bin/initdb: install the package postgresql")
        programs, self.folder = found[-1].parent, tempfile.mkdtemp(prefix="tandem-postgres-")
        other = {}
        if os.geteuid() == 0:  # as whom it refuses to run
            shutil.chown(self.folder, "postgres")
            other = {"user": "postgres", "group": "postgres", "extra_groups": []}
        quiet = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **other}
        subprocess.run([programs / "initdb", "-D", f"{self.folder}/data", "-U", "postgres", "-A", "trust", "--no-sync"], check=True, **quiet)
        self.url = f"postgres://postgres@localhost/postgres?host={self.folder}"
        command = [programs / "postgres", "-D", f"{self.folder}/data", "-k", self.folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        super().__init__("postgres", command, **quiet)

    def begin(self):
        super().begin()
        wait_for("Postgres", self.answers)

    def answers(self):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.connect(f"{self.folder}/.s.PGSQL.5432")
            return "ready" in pathlib.Path(f"{self.folder}/data/postmaster.pid").read_text()
        return False

    def close(self):
        self.kill()
        shutil.rmtree(self.folder)


class Bucket(Process):
    def __init__(self, folder):
        self.folder, self.port = pathlib.Path(folder), free_port()
        self.url = "s3://bucket/tandem"
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        super().__init__("s3", [sys.executable, pathlib.Path(__file__).with_name("s3_server.py"), folder, str(self.port)],
                         stdout=subprocess.DEVNULL, stderr=open(f"{folder}.log", "a"))

    def begin(self):
        super().begin()
        wait_for("the S3 server", lambda: listens(self.port))


class Tandem(Process):
    """A router or a backend on a port of its own, behind a proxy where one is asked for."""

    def __init__(self, folder, name, arguments, environment, port=None):
        self.port, self.log = port or free_port(), pathlib.Path(folder) / f"{name}.log"
        self.base = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        super().__init__(name, [os.path.abspath(TANDEM), *arguments(self.port)], env={**os.environ, **environment})

    def begin(self):
        self.starts += 1
        with open(self.log, "a") as log:
            self.options |= {"stdout": log, "stderr": subprocess.STDOUT}
            super().begin()

    def said(self, words):
        return len(re.findall(words, self.log.read_text()))

    def is_up(self):
        return self.process.poll() is None and listens(self.port)


class Proxy:
    """Copies bytes between who connects and a port, until it is told to cut or to hold them."""

    def __init__(self, target):
        self.target, self.is_held, self.lock, self.pairs = target, threading.Event(), threading.Lock(), {}
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.base = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self.lock:
                self.pairs[near, far] = 2  # directions that are open
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(source, sink, (near, far)), daemon=True).start()

    def copy(self, source, sink, pair):
        is_whole = False
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                while self.is_held.is_set():
                    time.sleep(0.05)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
            is_whole = True
        with self.lock:
            left = self.pairs.get(pair, 0) - 1
            if pair in self.pairs:
                self.pairs[pair] = left
        if left == 0 or not is_whole:
            self.end(pair)

    def end(self, pair):
        with self.lock:
            if self.pairs.pop(pair, None) is None:
                return
        for one in pair:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def cut(self):
        """Every connection, at once."""
        for pair in list(self.pairs):
            self.end(pair)

    def hold(self, seconds):
        """Connections stay, and nothing arrives."""
        self.is_held.set()
        time.sleep(seconds)
        self.is_held.clear()
