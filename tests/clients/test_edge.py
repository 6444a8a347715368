"""The edge of a server: TLS and certificates that change, a path that a proxy shows it under, a line of the log for each
request."""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import ROOT, Process

# Where services are required, its absence is a failure.
is_spared = shutil.which("openssl") is None and os.environ.get("TEST_SERVICES") != "required"
needs_openssl = pytest.mark.skipif(is_spared, reason="openssl makes the certificates")


def certificate(folder, name):
    """A certificate of this machine that signed itself."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", cert, *subject], check=True, capture_output=True)
    return cert, key


def signed(folder, name, authority, use="clientAuth"):
    """A certificate of a client (or of a server on this machine), which `authority` signed."""
    cert, key, request, kind = (folder / f"{name}.{end}" for end in ("pem", "key", "csr", "ext"))
    kind.write_text(f"basicConstraints=CA:FALSE\nextendedKeyUsage={use}\nsubjectAltName=IP:127.0.0.1\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"]
    subprocess.run(["openssl", "req", *new, "-keyout", key, "-out", request], check=True, capture_output=True)
    by = ["-CA", authority[0], "-CAkey", authority[1], "-CAcreateserial", "-days", "2", "-extfile", kind]
    subprocess.run(["openssl", "x509", "-req", "-in", request, "-out", cert, *by], check=True, capture_output=True)
    return cert, key


def get(url, *trusted, identity=None):
    context = ssl.create_default_context()
    for cert in trusted:
        context.load_verify_locations(cert)
    if identity:
        context.load_cert_chain(*identity)
    with urllib.request.urlopen(url, context=context) as answer:
        return answer.status


@needs_openssl
def test_tls(tmp_path):
    old, new, authority = (certificate(tmp_path, name) for name in ("old", "new", "authority"))
    client, stranger = signed(tmp_path, "client", authority), signed(tmp_path, "stranger", new)
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    shutil.copy(old[0], cert)
    shutil.copy(old[1], key)
    server = Process(
        tmp_path, "serve", "--port", "0", "--ssl-certfile", cert, "--ssl-keyfile", key,
        "--ssl-ca-certs", authority[0], "--ssl-cert-reqs", "1",
    )
    assert server.url.startswith("https://")
    assert get(server.url + "/health", old[0]) == 200
    assert get(server.url + "/health", old[0], identity=client) == 200
    for trusted, identity in ((new[0], None), (old[0], stranger)):
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            get(server.url + "/health", trusted, identity=identity)
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        get(server.url.replace("https", "http") + "/health")
    port = server.url.rsplit(":", 1)[1]
    health = [server.process.args[0], "health", "--port", port, "--ssl-certfile", cert]
    assert subprocess.run(health, capture_output=True).returncode == 0

    shutil.copy(new[0], cert)
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert get(server.url + "/health", old[0]) == 200, "a key that does not fit is not taken"
    shutil.copy(new[1], key)
    server.process.send_signal(signal.SIGHUP)
    for _ in range(100):
        try:
            assert get(server.url + "/health", new[0]) == 200
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    else:
        raise AssertionError(server.log.read_text())
    server.end()


def test_root_path_and_log(tmp_path):
    server = Process(
        tmp_path, "serve", "--port", "0", "--root-path", "/llm/", "--log-format", "json",
        "--disable-access-log-for-endpoints", "/health,/v1/models/{*id}",
    )
    client = openai.OpenAI(base_url=server.url + "/llm/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    client.models.retrieve(model)
    for path in ("/health", "/llm/health", "/llm", "/llm/docs"):
        assert get(server.url + path) == 200
    asked = dict(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=5, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**asked, extra_headers={"x-request-id": "mine"})
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_headers={"x-request-id": "streamed"}))
    assert chunks
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**asked, "model": "no"}, extra_headers={"x-request-id": "wrong"})
    server.end()
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    lines = {line["request_id"]: line for line in lines if line["target"] == "access"}
    assert not any(line["path"] in ("/health", "/v1/models/" + model) for line in lines.values())
    assert any(line["path"] == "/v1/models" for line in lines.values())
    for name in ("mine", "streamed"):
        line = lines[name]
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert (line["model"], line["prompt_tokens"], line["generated_tokens"]) == (model, whole.usage.prompt_tokens, 5)
        assert 0 < line["ttft_ms"] <= line["total_ms"]
    assert lines["wrong"]["status"] == 404 and "model" not in lines["wrong"]


@needs_openssl
def test_router_and_backend_know_each_other_by_certificates(tmp_path):
    backends, routers = certificate(tmp_path, "backends"), certificate(tmp_path, "routers")
    cert, key = signed(tmp_path, "backend", backends, "serverAuth")
    router, stranger = signed(tmp_path, "router", routers), signed(tmp_path, "stranger", backends)
    ssl_options = ("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", routers[0], "--ssl-cert-reqs", "2")
    (tmp_path / "b").mkdir()
    # Beyond this machine, without a token: a certificate is enough.
    backend = Process(tmp_path / "b", "backend", "--listen", "0.0.0.0:0", *ssl_options)
    url = f"grpcs://127.0.0.1:{backend.url.rsplit(':', 1)[1]}"
    shown = ("--backend-ssl-certfile", router[0], "--backend-ssl-keyfile", router[1])
    (tmp_path / "r").mkdir()
    front = Process(tmp_path / "r", "router", "--port", "0", "--backend", url, "--backend-ssl-ca-certs", backends[0], *shown)
    client = openai.OpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    assert client.completions.create(model=model, prompt="The bakery", max_tokens=4).choices[0].text
    front.end()

    def refused(expected, *options, url=url):
        """A router waits for a backend that it does not reach, and says why."""
        command = [backend.process.args[0], "router", "--backend", url, "--data-dir", tmp_path / "x", "--port", "0", *options]
        with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log, stdout=log) as router:
            try:
                for _ in range(600):
                    said = (tmp_path / "log").read_text()
                    if expected in said:
                        return
                    time.sleep(0.05)
                raise AssertionError(f"{expected!r} is not in {said}")
            finally:
                router.terminate()

    trusted = ("--backend-ssl-ca-certs", backends[0])
    refused("invalid peer certificate", "--backend-ssl-ca-certs", routers[0], *shown)
    refused("CertificateRequired", *trusted)
    refused("UnknownCA", *trusted, "--backend-ssl-certfile", stranger[0], "--backend-ssl-keyfile", stranger[1])
    refused("wants --backend-ssl-ca-certs")
    refused("are for backends at https://", *trusted, url="http://127.0.0.1:9")
    backend.end()


@needs_openssl
def test_a_router_that_waits_speaks_tls(tmp_path):
    """Before its first backend answers, a router says that it waits, behind the same certificate as later, which may be renewed
    meanwhile."""
    (cert, key), new = certificate(tmp_path, "server"), certificate(tmp_path, "new")
    with socket.socket() as backend, socket.socket() as free:
        for listener in (backend, free):
            listener.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem"), "router", "--port", str(port),
            "--backend", f"http://127.0.0.1:{backend.getsockname()[1]}", "--ssl-certfile", cert, "--ssl-keyfile", key,
            "--data-dir", tmp_path / "data",
        ]
        with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log, stdout=log) as router:
            for _ in range(200):
                try:
                    assert get(f"https://127.0.0.1:{port}/health", cert) == 200
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            else:
                raise AssertionError((tmp_path / "log").read_text())
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(f"https://127.0.0.1:{port}/v1/models", cert)
            assert refused.value.code == 503
            assert json.load(refused.value)["error"]["code"] == "no_backend"
            with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
                get(f"http://127.0.0.1:{port}/health")
            shutil.copy(new[0], cert)
            shutil.copy(new[1], key)
            router.send_signal(signal.SIGHUP)
            for _ in range(100):
                try:
                    assert get(f"https://127.0.0.1:{port}/health", new[0]) == 200
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            else:
                raise AssertionError((tmp_path / "log").read_text())
            router.terminate()
            assert router.wait(timeout=30) == 0
