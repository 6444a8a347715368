"""Two servers on one Postgres and one S3: whoever trains is killed, or sleeps longer than its lease. Needs the package
postgresql. Standard library only. See scripts/prove."""
import contextlib
import pathlib
import signal
import tempfile
import time

from demo import Api, start, watch
from prove_pieces import Bucket, Postgres

LEASE_S = 15


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
        with contextlib.closing(Postgres()) as database, contextlib.closing(Bucket(root / "s3")) as bucket:
            flags = ["--database-url", database.url, "--artifact-url", bucket.url]
            servers = [Server(binary, root / name, flags, bucket.environment) for name in ("one", "two")]
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
