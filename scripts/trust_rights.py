"""Who may do what: what once showed or gave too much. See prove_trust.py."""
import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.parse

from prove import TANDEM
from prove_ledger import chat, rows
from trust_server import ITEMS, JSON, adapter, demand, end_of, filled, heard, item, request, serving, words


@item("keys with roles and tenants: make, list, rotate, revoke", "one key opens everything")
def keys():
    with serving() as server:
        infer, train = server.key_of("infer", "a"), server.key_of("train", "b")
        statuses = [server.call("GET", "/v1/files", key=key)[0] for key in (infer, train)]
        demand(statuses == [403, 200], statuses)
        listed = server.client.keys("list")
        demand(infer not in listed[0] + listed[1], "the list shows a key")
        database = b"".join(path.read_bytes() for path in server.data.glob("tandem.db*"))
        demand(infer.encode() not in database, "a key is kept as it is")
        id = next(word for line in (listed[0] + listed[1]).splitlines() if "infer" in line for word in line.split() if word.startswith("key-"))
        rotated = server.client.keys("rotate", id)[0]
        time.sleep(3)
        statuses = [server.call("GET", "/v1/models", key=key)[0] for key in (infer, rotated)]
        server.client.keys("revoke", next(word for line in "".join(server.client.keys("list")).splitlines() if "infer" in line and "revoked" not in line
                                          for word in line.split() if word.startswith("key-")))
        time.sleep(3)
        statuses.append(server.call("GET", "/v1/models", key=rotated)[0])
        return f"infer asks for files: 403; after rotate the old and the new: {statuses[0]}, {statuses[1]}; revoked: {statuses[2]}; the database holds no key"


@item("another tenant's file, job and model", "seen and deleted by every key")
def tenants():
    with serving() as server:
        a, b = server.key_of("train", "a"), server.key_of("train", "b")
        form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\nContent-Disposition: form-data; name="file"; ' \
               b'filename="x.jsonl"\r\n\r\n' + rows("sft") + b"\r\n--b--\r\n"
        file = json.loads(server.call("POST", "/v1/files", form, "multipart/form-data; boundary=b", key=a)[1])["id"]
        job = json.loads(server.call("POST", "/v1/fine_tuning/jobs", {"model": "tandem-demo", "training_file": file, "max_steps": 2}, key=a)[1])["id"]
        model = end_of(server, job)["fine_tuned_model"]
        asked = [("GET", f"/v1/files/{file}"), ("DELETE", f"/v1/files/{file}"), ("GET", f"/v1/files/{file}/content"),
                 ("GET", f"/v1/fine_tuning/jobs/{job}"), ("POST", f"/v1/fine_tuning/jobs/{job}/cancel"), ("DELETE", f"/v1/models/{model}"),
                 ("GET", f"/v1/models/{model}")]
        statuses = [server.call(*one, key=b)[0] for one in asked] + [server.call("POST", "/v1/chat/completions", chat(model, "Hi"), key=b)[0]]
        demand(set(statuses) == {404}, statuses)
        demand(server.call("GET", f"/v1/files/{file}", key=a)[0] == server.call("GET", f"/v1/files/{file}")[0] == 200)
        return f"{len(statuses)} calls of another tenant: all 404; its owner and an admin: 200"


@item("cached_tokens across tenants, and cache_salt", "they tell what another key sent")
def cache():
    with serving() as server:
        def cached(key, **more):
            body = chat("tandem-demo", "A long question that is asked twice. " * 20) | more
            return json.loads(server.call("POST", "/v1/chat/completions", body, key=key)[1])["usage"]["prompt_tokens_details"]["cached_tokens"]

        a, b = server.key_of("infer", "a"), server.key_of("infer", "b")
        counts = cached(a), cached(a), cached(b), cached(a, cache_salt="x"), cached(a, cache_salt="x")
        demand(counts[0] == counts[2] == counts[3] == 0 and counts[1] > 0 and counts[4] > 0, counts)
        return f"the same key twice {counts[0]}, {counts[1]}; another tenant {counts[2]}; the first with a salt {counts[3]}, {counts[4]}"


@item("limits of a key", "none")
def limits():
    with serving() as server:
        key = server.key_of("infer", "a", "--requests-per-minute", "3")
        answers_ = [server.call("POST", "/v1/chat/completions", chat("tandem-demo", "Hi"), key=key) for _ in range(5)]
        demand([answer[0] for answer in answers_] == [200, 200, 200, 429, 429], [answer[0] for answer in answers_])
        tokens = server.key_of("infer", "a", "--tokens-per-minute", "30")
        statuses = [server.call("POST", "/v1/chat/completions", chat("tandem-demo", "Hi"), key=tokens)[0] for _ in range(6)]
        demand(statuses[0] == 200 and statuses[-1] == 429, statuses)
        return f"3 requests a minute: the fourth {words(answers_[3])[:90]} (retry-after {answers_[3][2]['retry-after']}); 30 tokens: {statuses}"


@item("an audit log", "none")
def audit():
    with tempfile.NamedTemporaryFile() as log, serving("--audit-log", log.name) as server:
        filled(server)
        key = server.key_of("infer", "a")
        server.call("GET", "/v1/files", key=key)
        server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}, key=key)
        lines = [json.loads(line) for line in open(log.name)]
        demand(any("adapter.load" in json.dumps(line) for line in lines) and key not in json.dumps(lines), lines)
        return f"{len(lines)} lines: " + ", ".join(f"{line.get('action', line.get('what'))} {line.get('status', line.get('outcome'))}" for line in lines)


def wrong_start(environment, *options):
    def ask():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([TANDEM, *options, "--data-dir", folder], capture_output=True, text=True, timeout=30, env={**os.environ, **environment})
            demand(done.returncode > 0, "it started")
            return f"exit {done.returncode}: {done.stderr.splitlines()[-1][:220]}"

    return ask


ITEMS += [
    ('TANDEM_API_KEY=""', "an open server", wrong_start({"TANDEM_API_KEY": ""}, "serve", "--port", "0")),
    ('TANDEM_API_KEY=","', "an open server", wrong_start({"TANDEM_API_KEY": ","}, "serve", "--port", "0")),
    ("a backend on 0.0.0.0 without a token", "speaks to anyone", wrong_start({}, "backend", "--listen", "0.0.0.0:0")),
]


@item("adapters outside of --lora-root, by ../, a symlink, and /etc/passwd", "read, and its content echoed")
def outside():
    with serving() as server, tempfile.TemporaryDirectory() as elsewhere:
        secret = adapter(pathlib.Path(elsewhere) / "secret")
        (secret / "adapter_config.json").write_text("SECRET-WORDS")
        (server.folder / "link").symlink_to(secret)
        paths = [str(secret), str(server.folder / "link"), f"{server.folder}/../{secret.parent.name}/secret", "/etc"]
        got = [server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}) for path in paths]
        demand(all(answer[0] in (400, 403, 404) and b"SECRET" not in answer[1] for answer in got), [words(answer) for answer in got])
        inside = adapter(server.folder / "inside")
        (inside / "adapter_config.json").write_text("SECRET-WORDS")
        broken = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(inside)})
        demand(broken[0] == 400 and b"SECRET" not in broken[1] and str(server.data).encode() not in broken[1], broken[1])
        return f"{', '.join(str(answer[0]) for answer in got)}: {words(got[0])[4:150]}; a broken config inside: {words(broken)[:120]}"


@item("Host, Origin and content types without a key", "any page commands the server")
def origins():
    with serving(key=None) as server:
        body = json.dumps(chat("tandem-demo", "Hi")).encode()
        host = urllib.parse.urlsplit(server.base).netloc

        def status(kind=JSON, **headers):
            lines = request("POST", "/v1/chat/completions", body, kind, None, **headers)
            return int(heard(server, lines).split()[1])

        got = {"plain": status(), "Origin of elsewhere": status(Origin="http://evil.example"), "its own": status(Origin=f"http://{host}"),
               "text/plain": status("text/plain"), "no type": status(None)}
        got["Host of elsewhere"] = int(heard(server, request("POST", "/v1/chat/completions", body, JSON, None).replace(b"Host: localhost", b"Host: evil.example")).split()[1])
        demand(got["plain"] == got["its own"] == 200 and got["Origin of elsewhere"] == got["Host of elsewhere"] == 403 and got["text/plain"] == 415, got)
        return ", ".join(f"{name} {value}" for name, value in got.items())
