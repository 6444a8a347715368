"""Everything at once, while things break: answers, jobs, uploads, deletions, batches, keys and swaps of adapters against one server
that is killed, stopped, frozen, run out of disk and descriptors, crowded with idle sockets, started on a disk that takes no
writes, cut from its clients, has its clock moved by hours and its files damaged. Afterwards what was acknowledged is there, and
no answer was wrong (prove_ledger.py). Standard library only; root for the disk, the package faketime for the clock. See
scripts/prove; a fleet's chaos is prove_many.py's.

usage: prove_chaos.py SECONDS SEED
"""
import collections
import contextlib
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse

import prove_ledger
from demo import start
from prove import TANDEM, rss_kib
from prove_ledger import ADMIN, Client, Ledger, Peers
from prove_pieces import FAKETIME, Proxy

DISK_MIB = 256


class Server:
    """Its clients come by a proxy, which stays when the server starts again."""

    def __init__(self, folder, options, clock):
        self.folder, self.options, self.clock = folder, [*options, "--api-key", ADMIN], clock
        self.environment = {}
        if FAKETIME:
            clock.write_text("+0")
            self.environment = {"LD_PRELOAD": str(FAKETIME[-1]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1",
                                "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self.proxy = Proxy(0)
        self.begin()
        self.client = Client(lambda: [self.proxy.base], folder / "adapters", ["--data-dir", str(folder)])

    def begin(self):
        with contextlib.redirect_stdout(None):
            self.process, self.base = start(TANDEM, str(self.folder), *self.options, environment=self.environment)
        self.proxy.target = urllib.parse.urlsplit(self.base).port

    def kill(self):
        self.process.kill()
        self.process.wait()


class Faults:
    """What breaks, each for a moment."""

    def __init__(self, server, ledger, disk, rng):
        self.server, self.ledger, self.disk, self.rng = server, ledger, disk, rng

    def kill(self):
        self.server.kill()
        self.server.begin()

    def stop(self):
        self.server.process.terminate()
        self.server.process.wait(60)
        self.server.begin()

    def freeze(self):
        self.server.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.5, 3))
        self.server.process.send_signal(signal.SIGCONT)

    def fill_the_disk(self):
        if not self.disk:
            return
        filler = self.server.folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        time.sleep(self.rng.uniform(0.5, 3))
        filler.unlink()

    def idle_sockets(self):
        host, port = urllib.parse.urlsplit(self.server.base).netloc.split(":")
        sockets = []
        with contextlib.suppress(OSError):
            for i in range(400):
                sockets.append(socket.create_connection((host, int(port)), timeout=2))
                if i % 2:
                    sockets[-1].send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        time.sleep(self.rng.uniform(0.5, 3))
        for open_socket in sockets:
            open_socket.close()

    def few_descriptors(self):
        pid = self.server.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 2, hard))
        time.sleep(self.rng.uniform(0.5, 3))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))

    def damage_a_state(self):
        """Or the tokens of a job, and have it read."""
        self.server.kill()
        files = sorted(file for kind in ("life-*/state.safetensors", "train.tokens") for file in self.server.folder.glob(f"jobs/*/{kind}"))
        if files:
            file = self.rng.choice(files)
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)
        self.server.begin()

    def damage_an_adapter(self):
        """For a moment: what it holds is read by nobody, and its requests fail."""
        self.server.kill()
        file = self.rng.choice(sorted(self.server.folder.glob("adapters/*/adapter_model.safetensors")))
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(damaged)
        self.ledger.excused = "asks: 500"
        self.server.begin()
        time.sleep(self.rng.uniform(0.5, 2))
        self.server.kill()
        file.write_bytes(content)
        self.server.begin()
        time.sleep(0.5)  # the last of those that were under way
        self.ledger.excused = None

    def start_on_a_read_only_disk(self):
        """It refuses, and nothing is lost."""
        if not self.disk:
            return
        self.server.kill()
        self.remount_read_only()
        command = [TANDEM, "serve", "--port", "0", "--data-dir", self.server.folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)
        if done.returncode == 0 or "Read-only file system" not in done.stderr:
            self.ledger.fault(f"on a read-only disk: {done.returncode} {done.stderr[-300:]}")
        self.server.begin()

    def remount_read_only(self):
        """Busy while somebody holds a file open to write, as `tandem keys` of a peer does for a moment."""
        until = time.monotonic() + 30
        while (done := subprocess.run(["mount", "-o", "remount,ro", self.disk], capture_output=True, text=True)).returncode:
            if "busy" not in done.stderr or time.monotonic() > until:
                raise RuntimeError(done.stderr)
            time.sleep(0.02)

    def cut(self):
        self.server.proxy.cut()

    def hold(self):
        self.server.proxy.hold(self.rng.uniform(0.5, 6))

    def move_the_clock(self):
        """By hours; it stays there. Any two are closer than the 24 hours of a batch."""
        if FAKETIME:
            aside = self.server.clock.with_suffix(".new")
            aside.write_text(f"{self.rng.choice((-9, -5, -1, 1, 5, 9)) * 3600:+}")
            os.replace(aside, self.server.clock)

    ALL = (kill, stop, freeze, fill_the_disk, idle_sockets, few_descriptors, damage_a_state, damage_an_adapter, start_on_a_read_only_disk,
           cut, hold, move_the_clock)


@contextlib.contextmanager
def small_disk():
    """A folder, and whether it is a disk of its own that may be filled."""
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder]
        is_own = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        if not is_own:
            print("not root, or nothing may be mounted: the disk is not filled")
        try:
            yield pathlib.Path(folder), is_own
        finally:
            if is_own:
                subprocess.run(["umount", "-l", folder], check=True)


def main(seconds, seed):
    rng, ledger, broke = random.Random(seed), Ledger(), collections.Counter()
    with small_disk() as (root, is_own_disk), tempfile.TemporaryDirectory() as outside:
        data, outside = root / "data", pathlib.Path(outside)
        data.mkdir()
        options = ["--lora-root", str(outside), "--max-connections", "2000", "--max-connections-per-address", "2000"]
        server = Server(data, options, outside / "clock")
        try:
            expected, folders, made = prove_ledger.undisturbed(server.client, outside)
            prove_ledger.first_names(server.client, ledger, folders)
            calm = rss_kib(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/fd"))
            peers, faults = Peers(server.client, ledger, expected, folders, seed), Faults(server, ledger, root if is_own_disk else None, rng)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(rng.uniform(0.5, 4))
                fault = rng.choice(Faults.ALL)
                fault(faults)
                broke[fault.__name__] += 1
            peers.stop()
            server.clock.write_text("+0")
            problems = list(prove_ledger.judge(server.client, ledger, expected, made))
            after = rss_kib(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/fd"))
        finally:
            server.kill()
    print("broke:", ", ".join(f"{name} {n}" for name, n in sorted(broke.items())))
    print("heard:", ", ".join(f"{what} {n}" for what, n in sorted(ledger.counts.items())))
    print(f"kept: {ledger}; {calm[0] >> 10} MiB and {calm[1]} descriptors before, {after[0] >> 10} and {after[1]} at the end")
    if after[1] > calm[1] + 50 or after[0] > 1.5 * calm[0]:
        problems.append("memory or descriptors grew")
    for problem in problems[:20]:
        print("  ", problem)
    return not problems and len(ledger.jobs) > 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, too
    held = main(float(sys.argv[1]), int(sys.argv[2]))
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
