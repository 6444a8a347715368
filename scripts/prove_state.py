"""Two servers on one Postgres and one artifact store: whoever trains is killed, or sleeps longer than its lease. Needs
the package postgresql; the bucket is moto's (pip install 'moto[server]'), or a folder where that is missing.
Standard library only. See scripts/prove."""
import contextlib
import importlib.util
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from demo import Api, start, watch

# Makes a cluster, starts it on a socket in its folder, says where, and ends with its standard input.
POSTGRES = """
d=$(mktemp -d)
"$0/initdb" -D "$d/data" -U postgres -A trust --no-sync >"$d/log" 2>&1 &&
"$0/pg_ctl" -D "$d/data" -w -l "$d/log" -o "-k $d -c listen_addresses=" start >/dev/null 2>&1 &&
echo "$d" || { cat "$d/log" >&2; exit 1; }
cat >/dev/null
"$0/pg_ctl" -D "$d/data" -m immediate stop >/dev/null 2>&1
rm -rf "$d"
"""
LEASE_S = 15


@contextlib.contextmanager
def postgres():
    programs = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        raise SystemExit("no /usr/lib/postgresql/*/bin/initdb: install the package postgresql")
    root = subprocess.check_output(["id", "-u"]) == b"0\n"
    shell = ["runuser", "-u", "postgres", "--", "sh"] if root else ["sh"]
    server = subprocess.Popen([*shell, "-c", POSTGRES, programs[-1].parent], cwd="/", text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    folder = server.stdout.readline().strip()
    if not folder:
        raise SystemExit("Postgres did not start")
    try:
        yield f"postgres://postgres@localhost/postgres?host={folder}"
    finally:
        server.stdin.close()
        server.wait(30)


@contextlib.contextmanager
def artifacts(folder):
    """A URL for --artifact-url, and the environment it needs."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        print("moto is not installed: the artifacts are in a folder")
        yield f"file://{folder}", {}
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(endpoint + "/bucket", method="PUT"), timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise SystemExit("moto did not start")
        print(f"S3 at {endpoint}")
        yield "s3://bucket/tandem", {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                                     "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    finally:
        server.terminate()
        server.wait(30)


class Server:
    def __init__(self, binary, folder, options, environment):
        self.binary, self.folder, self.options, self.environment = binary, folder, options, environment
        folder.mkdir(exist_ok=True)
        self.begin()

    def begin(self):
        self.process, base = start(self.binary, str(self.folder), *self.options, environment=self.environment)
        self.api = Api(base)

    def has_begun(self, job):
        """Whether its log says that it trains the job."""
        log = (self.folder / "server.log").read_text()
        return any("job started" in line and job["id"] in line for line in log.splitlines())


def events(api, job):
    return api.call("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100")["data"]


def step(api, job):
    return max([event["data"].get("step", 0) for event in events(api, job) if event.get("data")], default=0)


def until(what, seconds=120):
    began = time.perf_counter()
    while not what():
        if time.perf_counter() - began > seconds:
            raise SystemExit(f"not within {seconds} s")
        time.sleep(0.02)
    return time.perf_counter() - began


def state(binary, create_job, trained_bytes):
    options = {"n_epochs": 2, "save_steps": 5, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory(prefix="tandem-state-") as root:
        root = pathlib.Path(root)
        alone = Server(binary, root / "alone", [], {})
        job = watch(alone.api, create_job(alone.api, **options)[0])
        expected = trained_bytes(alone.api, alone.folder, job)
        alone.process.terminate()
        alone.process.wait(30)
        print("undisturbed:", expected)
        with postgres() as database, artifacts(root / "artifacts") as (url, environment):
            flags = ["--database-url", database, "--artifact-url", url]
            servers = [Server(binary, root / name, flags, environment) for name in ("one", "two")]
            well = True
            for how in (signal.SIGKILL, signal.SIGSTOP):
                job, _ = create_job(servers[0].api, **options)
                until(lambda: any(server.has_begun(job) for server in servers))
                holder = next(server for server in servers if server.has_begun(job))
                other = next(server for server in servers if server is not holder)
                until(lambda: step(other.api, job) >= 12)
                holder.process.send_signal(how)
                before = step(other.api, job)
                took = until(lambda: other.has_begun(job))
                print(f"{how.name} of the holder at step {before}: the other goes on after {took:.1f} s "
                      f"(a lease lasts {LEASE_S} s)")
                if how == signal.SIGSTOP:
                    # It wakes while the other trains the same job.
                    holder.process.send_signal(signal.SIGCONT)
                job = watch(other.api, job)
                got = trained_bytes(other.api, other.folder, job)
                ends = sum("successfully completed" in event["message"] for event in events(other.api, job))
                print(f"  {job['status']}, ended {ends} time(s), same bytes: {got == expected}")
                well = well and (job["status"], ends, got) == ("succeeded", 1, expected)
                if how == signal.SIGKILL:
                    holder.process.wait()
                    holder.begin()
                answers = {server.api.ask(job["fine_tuned_model"], "Who is the baker?") for server in servers}
                print(f"  both servers answer with it: {len(answers) == 1}")
                well = well and len(answers) == 1
            log = (holder.folder / "server.log").read_text()
            print("  the sleeper says:", "no longer ours" in log)
            well = well and "no longer ours" in log
            for server in servers:
                server.process.terminate()
                server.process.wait(30)
            return well
