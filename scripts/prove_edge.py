"""What the edge promises to who waits: beside a batch, and behind a proxy. Standard library only. See scripts/prove."""
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from demo import Api, start

TANDEM = "target/release/tandem"
QUESTIONS = ["Who is the baker?", "Tell me about the village.", "Where does Ada live?", "Who are you?"]
ASKED = 40


def first_token(api, model, question):
    """Seconds to the first content of a streamed chat, and to its end."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 16}
    request = urllib.request.Request(api.base + "/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    began, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if first is None and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
    return first, time.perf_counter() - began


def measured(api, model):
    times = [first_token(api, model, f"{i}: {QUESTIONS[i % len(QUESTIONS)]}") for i in range(ASKED)]
    firsts, ends = sorted(first for first, _ in times if first), sorted(end for _, end in times)
    figures = [statistics.median(firsts), firsts[-1], statistics.median(ends), ends[-1]]
    return [1000 * figure for figure in figures]


def batch():
    """The median of a live request's time to its first token, and its whole time, beside a batch."""
    with tempfile.TemporaryDirectory() as folder:
        server, base = start(TANDEM, folder)
        try:
            api = Api(base)
            model = api.call("GET", "/v1/models")["data"][0]["id"]
            measured(api, model)
            alone = measured(api, model)
            rows = pathlib.Path(folder) / "requests.jsonl"
            body = {"model": model, "max_tokens": 300, "ignore_eos": True}
            with open(rows, "w") as file:
                for i in range(20_000):
                    asked = {**body, "prompt": f"{i}: " + "Once upon a time there was a village. " * 4, "seed": i}
                    file.write(json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": asked}) + "\n")
            made = api.call("POST", "/v1/batches", {"input_file_id": api.upload(rows, "batch"), "endpoint": "/v1/completions",
                                                    "completion_window": "24h"})
            while api.call("GET", "/v1/batches/" + made["id"])["request_counts"]["completed"] < 50:
                time.sleep(0.2)
            before = api.call("GET", "/v1/batches/" + made["id"])["request_counts"]["completed"]
            beside = measured(api, model)
            done = api.call("GET", "/v1/batches/" + made["id"])["request_counts"]["completed"] - before
            for name, (first, worst_first, end, worst_end) in (("alone", alone), ("beside a batch", beside)):
                print(f"{name:15} first token {first:.0f} ms (worst {worst_first:.0f}), 16 tokens {end:.0f} ms (worst {worst_end:.0f})")
            print(f"lines of the batch answered meanwhile: {done}")
            return None not in beside and done > 0
        finally:
            server.terminate()
            server.wait(60)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {base}; }} }}
}}
"""


def proxy():
    """nginx as it comes cuts what says nothing for 60 s; a request that waits for a place says something."""
    with tempfile.TemporaryDirectory() as folder:
        server, base = start(TANDEM, folder, "--max-num-seqs", "1")
        port = free_port()
        config = pathlib.Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, port=port, base=base))
        nginx = subprocess.Popen(["nginx", "-c", str(config), "-e", f"{folder}/error.log"])
        try:
            direct, proxied = Api(base), Api(f"http://127.0.0.1:{port}")
            model = direct.call("GET", "/v1/models")["data"][0]["id"]
            held = threading.Event()

            def hold():
                """Takes the one place until more than a minute is over."""
                began = time.perf_counter()
                body = {"model": model, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "n": 8}
                while time.perf_counter() - began < 75:
                    held.set()
                    direct.call("POST", "/v1/completions", body)

            # Two of them, so that one always waits before the stream.
            holders = [threading.Thread(target=hold) for _ in range(2)]
            for holder in holders:
                holder.start()
            held.wait()
            time.sleep(1)
            body = {"model": model, "messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": True, "max_tokens": 8,
                    "priority": 1}
            request = urllib.request.Request(proxied.base + "/v1/chat/completions", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            began, comments, first, finished = time.perf_counter(), 0, None, False
            with urllib.request.urlopen(request, timeout=300) as response:
                for line in response:
                    comments += line.startswith(b":")
                    if line.startswith(b"data: {") and first is None:
                        first = time.perf_counter() - began
                    finished |= line.startswith(b"data: [DONE]")
            for holder in holders:
                holder.join()
            print(f"the first chunk came after {first:.0f} s and {comments} comments; finished: {finished}")
            return finished and first > 60
        finally:
            nginx.terminate()
            nginx.wait(30)
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    proofs = {"batch": batch, "proxy": proxy}
    if len(sys.argv) != 2 or sys.argv[1] not in proofs:
        raise SystemExit(f"usage: prove_edge.py {'|'.join(proofs)}")
    held = proofs[sys.argv[1]]()
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
