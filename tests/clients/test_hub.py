"""Names of the hub, against a hub of our own, judged by huggingface_hub: what it finds in the cache that we filled."""

import json
import os
import pathlib
import signal
import subprocess
import time
import urllib.request

import huggingface_hub
import pytest
from conftest import ROOT, Process
from hub import COMMIT, CONVERTED, ITS_COMMIT, TOKEN, Hub

PARQUET, PARQUET_ROWS = ROOT / "router/text/src/fixture/parquet/datasets.parquet", 5
MODEL, ADAPTER = "tandem/demo", "tandem/ahoy"
BINARY = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")


def rows(*answers):
    return "".join(json.dumps({"prompt": "Ahoy", "completion": f" {answer}"}) + "\n" for answer in answers).encode()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    demo = contents(ROOT / "server/demo")
    demo = {name: demo[name] for name in demo if name.endswith((".json", ".safetensors"))}
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "rows.jsonl").write_text('{"prompt": "Ahoy", "completion": " matey"}\n' * 4)
    recipe = [f"model={ROOT / 'server/demo'}", f"training_file={folder / 'rows.jsonl'}", f"output_dir={folder}", "max_steps=1"]
    subprocess.run([BINARY, "train", *recipe], check=True, capture_output=True)
    weights = demo.pop("model.safetensors")
    return {
        MODEL: {**demo, "model.safetensors": weights, "pytorch_model.bin": b"pickle", "README.md": b"# Demo"},
        ADAPTER: contents(folder / "adapter"),
        "tandem/pickled": {**demo, "pytorch_model.bin": b"pickle"},
        "gated/demo": {**demo, "model.safetensors": weights},
        "datasets/tandem/rows": {
            "README.md": b"# Rows",
            "data/train-00000-of-00002.jsonl": rows("a", "b"),
            "data/train-00001-of-00002.jsonl": rows("c", "d"),
            "data/validation-00000-of-00001.jsonl": rows("e"),
        },
        "datasets/tandem/parts": {
            "README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n",
            "en/1.jsonl": rows("a"),
            "en/2.jsonl": rows("b"),
            "de.jsonl": rows("c", "d", "e"),
        },
        # A program makes its rows; the hub has them as Parquet.
        "datasets/tandem/scripted": {"scripted.py": b"import os", "README.md": b"# Scripted"},
        f"datasets/tandem/scripted@{CONVERTED}": {
            "default/train/0000.parquet": PARQUET.read_bytes(),
            "default/test/0000.parquet": PARQUET.read_bytes(),
        },
    }


@pytest.fixture
def hub(repositories):
    hub = Hub(repositories)
    yield hub
    hub.end()


@pytest.fixture
def cache(tmp_path, hub, monkeypatch):
    """HF_HOME and HF_ENDPOINT of every process that is started, and the cache's folder."""
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return tmp_path / "home/hub"


def download(*args):
    return subprocess.run([BINARY, "download", *args], capture_output=True, text=True)


def test_the_cache_is_the_one_of_huggingface_hub(hub, cache, repositories):
    done = download(MODEL)
    assert done.returncode == 0, done.stderr
    folder = pathlib.Path(done.stdout.strip())
    assert {path.name for path in folder.iterdir()} == set(repositories[MODEL]) - {"pytorch_model.bin", "README.md"}
    for revision in ("main", COMMIT):
        found = huggingface_hub.try_to_load_from_cache(MODEL, "config.json", cache_dir=cache, revision=revision)
        assert pathlib.Path(found).read_bytes() == repositories[MODEL]["config.json"]
        snapshot = huggingface_hub.snapshot_download(MODEL, cache_dir=cache, revision=revision, local_files_only=True)
        assert pathlib.Path(snapshot) == folder
    [scanned] = huggingface_hub.scan_cache_dir(cache).repos
    assert scanned.repo_id == MODEL and [revision.commit_hash for revision in scanned.revisions] == [COMMIT]
    # Again: nothing is fetched but the listing.
    hub.asked.clear()
    assert download(MODEL).stdout == done.stdout
    assert hub.ranges("storage") == []


def test_what_huggingface_hub_fetched_is_taken(hub, cache, repositories, monkeypatch):
    huggingface_hub.snapshot_download(MODEL, cache_dir=cache, endpoint=hub.url, ignore_patterns="*.bin")
    hub.asked.clear()
    assert download(MODEL).returncode == 0
    assert hub.ranges("storage") == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert download(MODEL).returncode == 0
    assert hub.asked == []
    refused = download(ADAPTER)
    assert refused.returncode == 78 and "HF_HUB_OFFLINE" in refused.stderr, refused.stderr


def test_a_transfer_that_breaks_off_goes_on(hub, cache, repositories):
    hub.break_after = [1_000_000, 500_000]
    done = download(MODEL)
    assert done.returncode == 0, done.stderr
    assert hub.ranges("storage") == [None, "bytes=1000000-", "bytes=1500000-"]
    folder = pathlib.Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == repositories[MODEL]["model.safetensors"]


def test_a_killed_download_is_resumed(hub, cache, repositories):
    hub.break_after = [1_000_000] + [0] * 20
    process = subprocess.Popen([BINARY, "download", MODEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = cache / "models--tandem--demo/blobs"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 1_000_000 for path in part.glob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A revision in the cache is a whole one.
    assert not (cache / "models--tandem--demo/refs").exists()
    hub.break_after, hub.asked = [], []
    done = download(MODEL)
    assert done.returncode == 0, done.stderr
    assert hub.ranges("storage") == ["bytes=1000000-"]
    folder = pathlib.Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == repositories[MODEL]["model.safetensors"]


def test_a_folder_of_the_callers(hub, cache, tmp_path, repositories):
    target = tmp_path / "mine"
    for _ in range(2):
        assert download(MODEL, "--local-dir", str(target)).returncode == 0
    assert len(hub.ranges("storage")) == 1
    assert contents(target)["model.safetensors"] == repositories[MODEL]["model.safetensors"]
    # huggingface_hub knows its own notes.
    hub.asked.clear()
    huggingface_hub.snapshot_download(MODEL, local_dir=target, endpoint=hub.url, ignore_patterns=["*.bin", "*.md"])
    assert hub.ranges("resolve") == []


@pytest.mark.parametrize(
    "args, variables, said",
    [
        (["no-such/model"], {}, ["no folder no-such/model in /", "no model or adapter no-such/model on http", "set HF_TOKEN"]),
        (["no-such/model"], {"HF_TOKEN": TOKEN}, ["that this token may see"]),
        (["no-such/model"], {"HF_TOKEN": "hf_wrong"}, ["does not accept the token"]),
        (["gated/demo"], {}, ["gated/demo is gated", "set HF_TOKEN", "/gated/demo)"]),
        ([MODEL, "--revision", "v9"], {}, ['no revision "v9"']),
        (["tandem/pickled"], {}, ["no weights in safetensors", "pytorch_model.bin"]),
        (["demo"], {}, ["these are ORG/NAME"]),
        ([MODEL], {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot reach http://127.0.0.1:9 for tandem/demo"]),
        ([MODEL], {"HF_HOME": "/proc/nowhere"}, ["HF_HOME (or HF_HUB_CACHE) puts the cache"]),
    ],
)
def test_refusals(hub, cache, monkeypatch, args, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = download(*args)
    assert refused.returncode == (1 if "cannot reach" in said[0] else 78), refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert all(part in last for part in said), refused.stderr


def test_a_token_opens_what_is_gated(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    assert download("gated/demo").returncode == 0


def test_what_is_damaged_on_its_way_is_not_kept(hub, cache):
    hub.damage = True
    refused = download(MODEL)
    assert refused.returncode == 1 and "was damaged on its way" in refused.stderr, refused.stderr
    hub.damage = False
    assert download(MODEL).returncode == 0


def ask(url, path, body=None):
    body = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_serving_by_name(hub, cache, tmp_path):
    process = Process(tmp_path, "serve", "--port", "0", MODEL, "--lora-modules", f"first={ADAPTER}", "--lora-root", str(tmp_path))
    try:
        load = "/v1/load_lora_adapter"
        assert ask(process.url, load, {"lora_name": "second", "lora_path": ADAPTER})[0] == 200
        status, body = ask(process.url, load, {"lora_name": "third", "lora_path": "no-such/adapter"})
        assert status == 404 and b"no-such/adapter on http" in body, body
        status, body = ask(process.url, load, {"lora_name": "third", "lora_path": MODEL})
        assert status == 400 and b"it is a model" in body, body
        models = json.loads(ask(process.url, "/v1/models")[1])["data"]
        assert [model["id"] for model in models] == [MODEL, "first", "second"]
        body = {"model": "second", "prompt": "Ahoy", "max_tokens": 2}
        assert ask(process.url, "/v1/completions", body)[0] == 200
        # The hub is away: the cache serves, and what is not in it is a 503.
        hub.end()
        assert ask(process.url, load, {"lora_name": "third", "lora_path": ADAPTER})[0] == 200
        assert ask(process.url, load, {"lora_name": "fourth", "lora_path": "tandem/other"})[0] == 503
    finally:
        process.end()


def train(*words):
    recipe = [f"model={ROOT / 'server/demo'}", *words]
    return subprocess.run([BINARY, "train", *recipe], capture_output=True, text=True)


def learned(done):
    """What the rows that were shown teach."""
    lines = [line for line in done.stdout.splitlines() if "\u00ab" in line and not line.startswith("---")]
    return [line.split("\u00ab")[1].split("\u00bb")[0].strip() for line in lines]


def test_rows_of_a_data_set(hub, cache, tmp_path, repositories, monkeypatch):
    shown = train("training_file=tandem/rows", "split=train[1:75%]", f"output_dir={tmp_path / 'x'}", "preview=9")
    assert shown.returncode == 0, shown.stderr
    assert "2 examples" in shown.stdout and [text[:1] for text in learned(shown)] == ["b", "c"], shown.stdout
    name = "data/train-00001-of-00002.jsonl"
    found = huggingface_hub.try_to_load_from_cache("tandem/rows", name, cache_dir=cache, repo_type="dataset")
    assert pathlib.Path(found).read_bytes() == repositories["datasets/tandem/rows"][name]
    # What is not wanted does not come.
    assert not hub.ranges("validation-00000")

    whole = ["dataset_name=tandem/rows", "validation_file=tandem/rows", "max_steps=1"]
    done = train(*whole, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "4 examples" in done.stdout and "1 examples" in done.stdout, done.stdout
    before = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = train(*whole, f"output_dir={tmp_path / 'again'}")
    assert again.returncode == 0 and "4 examples" in again.stdout, again.stderr
    assert len(hub.asked) == before
    tensors = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / tensors).read_bytes() == (tmp_path / "again" / tensors).read_bytes()


def test_parts_and_converted_data_sets(cache, tmp_path):
    for words, count in [
        (["training_file=tandem/parts", "dataset_config=de"], "3 examples"),
        (["training_file=tandem/parts", "subset=en"], "2 examples"),
        (["training_file=tandem/scripted", "split=test"], f"{PARQUET_ROWS} examples"),
    ]:
        shown = train(*words, f"output_dir={tmp_path / 'x'}", "preview=1")
        assert count in shown.stdout, shown.stdout + shown.stderr
    found = huggingface_hub.try_to_load_from_cache(
        "tandem/scripted", "default/test/0000.parquet", cache_dir=cache, repo_type="dataset", revision=CONVERTED
    )
    assert ITS_COMMIT in found


@pytest.mark.parametrize("words, said", [
    (["training_file=tandem/parts"], "several parts, en, de: give one as dataset_config"),
    (["training_file=tandem/rows", "split=dev"], "no split dev, its splits are train, validation"),
    (["training_file=tandem/no-rows"], "no data set tandem/no-rows"),
    (["training_file=tandem/rows", "dataset_revision=v9"], "no revision"),
    (["training_file=tandem/rows.jsonl"], "tandem/rows.jsonl"),
])
def test_data_sets_that_are_not_there(cache, tmp_path, words, said):
    done = train(*words, f"output_dir={tmp_path / 'x'}", "preview=1")
    assert done.returncode != 0 and said in done.stderr, done.stderr
