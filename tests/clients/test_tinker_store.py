"""What the real `tinker` SDK keeps and finds again: every route of it, and one kind of adapter for it and for fine-tune jobs."""

import asyncio
import concurrent.futures
import json
import os
import re
import subprocess
import time
import urllib.request

import numpy
import openai
import pytest
import tinker
from conftest import ROOT, Process
from test_tinker import TEXTS, connect, greedy, learn, logprobs, prompt, sampler_of, supervised, trainer

DATA = [supervised(text) for text in TEXTS]


def routes():
    """Of the SDK: method, path, and how a path of its looks."""
    paths = json.loads((ROOT / "openapi/openapi.json").read_text())["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            if "tinker" in operation.get("tags", []):
                yield method.upper(), path, re.compile(re.sub(r"\{\w+\}", "[^/]+", path))


def test_every_route_by_the_sdk(tmp_path, monkeypatch):
    server = Process(tmp_path, "serve", "--port", "0", "--log-format", "json")
    service = connect(server.url)
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    with service:
        rest = tinker.RestClient(base_url=server.url)
        base = rest.get_server_capabilities().result().supported_models[0].model_name
        began = time.monotonic()
        model = trainer(service, base)
        learn(model, DATA)
        path = model.save_state("kept", ttl_seconds=1000).result().path
        named = model.save_weights_for_sampler("named").result().path
        assert greedy(service.create_sampling_client(model_path=named).result(), TEXTS[0])
        again = service.create_training_client_from_state_with_optimizer(path).result()
        assert again.get_info().model_data.model_name == base
        rest.publish_checkpoint_from_tinker_path(path).result()
        is_public = lambda: [one.public for one in rest.list_checkpoints(path.split("/")[2]).result().checkpoints if one.tinker_path == path]
        assert is_public() == [True]
        rest.unpublish_checkpoint_from_tinker_path(path).result()
        assert is_public() == [False]
        rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
        kept = rest.list_user_checkpoints().result().checkpoints
        assert {one.tinker_path: one.expires_at for one in kept} == {path: None, named: None}
        assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 8
        run = rest.get_training_run_by_tinker_path(path).result()
        assert run.training_run_id in [one.training_run_id for one in rest.list_training_runs().result().training_runs]
        assert len(rest.list_sessions().result().sessions) == 1
        session = rest.get_session(run.training_run_id.split(":")[0]).result()
        assert rest.get_sampler(session.sampler_ids[0]).result().model_path == named
        rest.delete_checkpoint_from_tinker_path(named).result()
        # Nothing of the SDK's own asks this.
        asyncio.run(tinker._client.AsyncTinker(base_url=server.url).service.health_check())
        time.sleep(max(0, 11 - (time.monotonic() - began)))  # a heartbeat
    server.end()
    lines = (json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{"))
    asked = [(line["method"], line["path"], line["status"]) for line in lines if line["target"] == "access"]
    found = {
        (method, path): {status for verb, got, status in asked if verb == method and form.fullmatch(got)}
        for method, path, form in routes()
    }
    print(*(f"{method} {path}: {sorted(statuses)}" for (method, path), statuses in found.items()), sep="\n")
    missing = [route for route, statuses in found.items() if not statuses & {200, 204}]
    assert not missing and len(found) >= 30, (missing, asked)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Process(tmp_path_factory.mktemp("shared"), "serve", "--port", "0")
    yield server.url
    server.end()


def fine_tune(client, model, **settings):
    rows = "".join(json.dumps({"prompt": f"Question {i}: ", "completion": " the answer is blue."}) + "\n" for i in range(8))
    file = client.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(training_file=file.id, model=model, extra_body=settings)
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


def scores(model):
    return numpy.concatenate(logprobs(model.forward(DATA, "cross_entropy").result()))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_client_goes_on_from_what_a_job_made(server, extra):
    client = openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)
    service, rest = connect(server), tinker.RestClient(base_url=server)
    base = client.models.list().data[0].id
    shape = {"lora_r": 4, "lora_alpha": 6, "lora_target_modules": ["q_proj", "down_proj"]}
    job = fine_tune(client, base, max_steps=4, save_steps=2, **shape, **extra)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
    assert checkpoint != job.fine_tuned_model
    found = {}
    for name in (checkpoint, job.fine_tuned_model):
        info = rest.get_weights_info_by_tinker_path(name).result()
        assert (info.lora_rank, info.train_attn, info.train_mlp, info.train_unembed) == (4, True, True, False)
        model = service.create_training_client_from_state(name).result()
        # The SDK samples from nothing that does not begin so.
        sampler = service.create_sampling_client(model_path=f"tinker://{name}").result()
        found[name] = scores(model)
        # Trained numbers and served ones are the same.
        served = [sampler.compute_logprobs(prompt(*text)).result()[1:] for text in TEXTS]
        numpy.testing.assert_allclose(found[name], numpy.concatenate(served), atol=1e-4)
        with pytest.raises(Exception, match="has weights, but no state of an optimizer"):
            service.create_training_client_from_state_with_optimizer(name).result()
    assert abs(found[checkpoint] - found[job.fine_tuned_model]).max() > 1e-3
    # It learns, and what it saves has the job's shape, which a model of Tinker's own has not.
    losses = [learn(model, DATA).metrics["loss:sum"] for _ in range(6)]
    assert losses[-1] < losses[0]
    path = model.save_state("on").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert learn(again, DATA).metrics == learn(model, DATA).metrics
    with pytest.raises(Exception, match="rank 4 and alpha 6.* on q_proj, down_proj; this model has rank 8 and alpha 32 on "):
        trainer(service, base).load_state(path).result()
    again.load_state(checkpoint).result()
    numpy.testing.assert_array_equal(scores(again), found[checkpoint])
    with pytest.raises(Exception, match="is the base, not an adapter"):
        service.create_training_client_from_state(base).result()
    with pytest.raises(Exception, match="No such checkpoint or adapter"):
        service.create_training_client_from_state("nobody").result()


def test_clients_and_a_job_share_passes_and_come_to_what_each_comes_to_alone(server):
    client = openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)
    base = client.models.list().data[0].id
    losses = {31: "cross_entropy", 32: "importance_sampling"}

    def train(seed, name):
        model = trainer(connect(server), base, seed=seed)
        told = [learn(model, of_loss(losses[seed]), losses[seed]) for _ in range(12)]
        path = model.save_weights_for_sampler(name).result().path
        return [(one.metrics, [list(row) for row in logprobs(one)]) for one in told], digest(path)

    def of_loss(loss):
        if loss == "cross_entropy":
            return DATA
        inputs = lambda text: {"target_tokens": text[1:], "logprobs": [-2.0] * (len(text) - 1), "advantages": [1.0] * (len(text) - 1)}
        return [tinker.Datum(model_input=prompt(*text[:-1]), loss_fn_inputs=inputs(text)) for text in TEXTS]

    def digest(name):
        return next(model.root for model in client.models.list().data if model.id == name)

    def job():
        return digest(fine_tune(client, base, max_steps=60, batch_size=2, seed=5).fine_tuned_model)

    def shared():
        lines = urllib.request.urlopen(server + "/metrics").read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem:train_shared_slices_total"))

    alone, before = [train(31, "alone"), train(32, "alone"), job()], shared()
    # Whether two want to go at the same moment is chance; that some do in five rounds is not.
    for turn in range(5):
        names = [f"beside-{turn}", f"besides-{turn}"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            works = [pool.submit(train, 31, names[0]), pool.submit(train, 32, names[1]), pool.submit(job)]
            sampler = connect(server).create_sampling_client(base_model=base).result()
            while not all(work.done() for work in works):
                sampler.sample(prompt(*TEXTS[1][:3]), 2, tinker.SamplingParams(max_tokens=8)).result()
        assert [work.result() for work in works] == alone
        if shared() > before:
            return
    assert shared() > before


def test_two_ranks_train_as_one(tmp_path):
    told = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        server = Process(folder, "serve", "--port", "0", "--tensor-parallel-size", str(ranks), "--dtype", "float32")
        service = connect(server.url)
        base = service.get_server_capabilities().supported_models[0].model_name
        model = trainer(service, base)
        losses = [learn(model, DATA).metrics["loss:sum"] for _ in range(6)]
        sampler, path = sampler_of(model), model.save_state("six").result().path
        text = greedy(sampler, TEXTS[0])
        losses.append(learn(model, DATA).metrics["loss:sum"])
        again = service.create_training_client_from_state_with_optimizer(path).result()
        assert learn(again, DATA).metrics["loss:sum"] == losses[-1]
        # A snapshot never changes, and a saved one says the same.
        for kept in (sampler, service.create_sampling_client(model_path=path).result()):
            assert greedy(kept, TEXTS[0]) == text
        told.append((losses, text))
        server.end()
    numpy.testing.assert_allclose(told[1][0], told[0][0], rtol=1e-5)
    assert told[1][1] == told[0][1]


@pytest.mark.parametrize("save", ["save_weights_for_sampler", "save_state"])
def test_what_a_client_saved_answers_and_a_job_starts_from_it(server, save):
    client = openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)
    service = connect(server)
    base = client.models.list().data[0].id
    model = trainer(service, base)
    for _ in range(40):
        learn(model, DATA)
    named = getattr(model, save)("start").result().path
    assert [greedy(service.create_sampling_client(model_path=named).result(), text) for text in TEXTS] == [text[2:] for text in TEXTS]
    answer = client.completions.create(model=named, prompt=TEXTS[0][:2], max_tokens=4, temperature=0, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == TEXTS[0][2:6]
    job = fine_tune(client, named, max_steps=1, learning_rate=1e-12)
    sampler = service.create_sampling_client(model_path=f"tinker://{job.fine_tuned_model}").result()
    assert [greedy(sampler, text) for text in TEXTS] == [text[2:] for text in TEXTS]


def test_another_tenant_loads_and_samples_what_is_published(tmp_path, monkeypatch):
    server = Process(tmp_path, "serve", "--port", "0", "--api-key", "tml-admin")
    binary = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")

    def tenant(name):
        command = [binary, "keys", "create", "--role", "train", "--tenant", name, "--data-dir", tmp_path / "data"]
        made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        key = "tml-" + re.search(r"sk-tandem-\S+", made)[0]
        time.sleep(2.5)  # keys count within two seconds
        return tinker.ServiceClient(base_url=server.url, api_key=key), tinker.RestClient(base_url=server.url, api_key=key)

    (alice, rest), (bob, _) = tenant("alice"), tenant("bob")
    base = rest.get_server_capabilities().result().supported_models[0].model_name
    model = trainer(alice, base)
    for _ in range(40):
        learn(model, DATA)
    state, adapter = model.save_state("state").result().path, model.save_weights_for_sampler("adapter").result().path
    for attempt in (lambda: bob.create_sampling_client(model_path=adapter), lambda: bob.create_training_client_from_state(state)):
        with pytest.raises(Exception, match="No such checkpoint"):
            attempt().result()
    for path in (state, adapter):
        rest.publish_checkpoint_from_tinker_path(path).result()
    for path in (state, adapter):
        sampler = bob.create_sampling_client(model_path=path).result()
        assert [greedy(sampler, text) for text in TEXTS] == [text[2:] for text in TEXTS]
    numpy.testing.assert_array_equal(scores(bob.create_training_client_from_state(state).result()), scores(model))
    rest.unpublish_checkpoint_from_tinker_path(adapter).result()
    with pytest.raises(Exception, match="No such checkpoint"):
        greedy(sampler, TEXTS[0])
    server.end()


@pytest.mark.parametrize("share", ["data folder", "artifacts"])
def test_a_lost_backend_takes_what_was_not_saved(tmp_path, share):
    """Behind a router a session lives on one backend; another goes on from what was saved, to the same numbers."""
    kept = [] if share == "data folder" else ["--artifact-url", f"file://{tmp_path}/shared"]

    def start(name, *command):
        folder = tmp_path / (name if kept else "one")
        folder.mkdir(exist_ok=True)
        return Process(folder, *command, *kept)

    backends = [start(name, "backend", "--listen", "127.0.0.1:0") for name in ("first", "second")]
    router = start("router", "router", "--port", "0", *(part for one in backends for part in ("--backend", one.url)))
    service, base = connect(router.url), "tandem-demo"
    model, other = trainer(service, base, seed=17), trainer(connect(router.url), base, seed=17)
    for _ in range(3):
        assert learn(model, DATA).metrics == learn(other, DATA).metrics
    path = model.save_state("three").result().path
    assert model.save_state("three", overwrite=True).result().path == path
    named = model.save_weights_for_sampler("named").result().path
    sampler = sampler_of(model)
    before = greedy(sampler, TEXTS[0])
    expected = [learn(model, DATA).metrics["loss:sum"] for _ in range(5)]
    # Whose backend goes: one of the two, and each session has its own.
    backends[0].process.kill()
    backends[0].process.wait()
    lost, lives = [], []
    for one in (model, other):
        try:
            one.forward(DATA, "cross_entropy").result()
            lives.append(one)
        except tinker.RequestFailedError as error:
            assert "what was not saved is gone" in str(error), error
            lost.append(one)
    assert len(lost) == len(lives) == 1, (lost, lives)
    if lost == [model]:
        with pytest.raises(tinker.RequestFailedError, match="no longer in memory"):
            greedy(sampler, TEXTS[0])
    else:
        assert greedy(sampler, TEXTS[0]) == before
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert greedy(sampler_of(again), TEXTS[0]) == before
    assert [learn(again, DATA).metrics["loss:sum"] for _ in range(5)] == expected
    assert greedy(service.create_sampling_client(model_path=named).result(), TEXTS[0])
    # Nothing is left of what was overwritten, or is deleted.
    rest = tinker.RestClient(base_url=router.url)
    listed = lambda: [one.tinker_path for one in rest.list_user_checkpoints().result().checkpoints]
    assert sorted(listed()) == sorted([path, named])
    files = lambda: [file for file in tmp_path.glob("**/tinker/**/*.safetensors") if kept and "shared" in file.parts or not kept]
    assert len(files()) == 1, files()
    for one in (path, named):
        rest.delete_checkpoint_from_tinker_path(one).result()
    assert not listed() and not files()
    for process in (router, backends[1]):
        process.end()
