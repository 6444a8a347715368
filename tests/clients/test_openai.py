"""Today's client of OpenAI, end to end."""

import json
import os
import subprocess
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request

import openai
import pytest
from conftest import ROOT, Process


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def can_chat(server):
    with urllib.request.urlopen(server + "/tokenizer_info") as answer:
        if json.load(answer)["chat_template"] is None:
            pytest.skip("the model has no chat template")


HELLO = [{"role": "user", "content": "Hello"}]


def test_models(client, model):
    assert client.models.retrieve(model).id == model


def test_completion(client, model):
    completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, logprobs=2, echo=True)
    logprobs = completion.choices[0].logprobs
    assert completion.choices[0].text.startswith("Once upon a time")
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert completion.usage.total_tokens == len(logprobs.tokens)


def test_completion_stream(client, model):
    asked = dict(model=model, prompt="Once upon a time", max_tokens=8, temperature=0)
    whole = client.completions.create(**asked).choices[0].text
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_embeddings(client, model):
    texts = ["Once upon a time", "The end"]
    # The client asks for base64 unless it is told not to.
    packed = client.embeddings.create(model=model, input=texts)
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")
    for ours, theirs in zip(packed.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-5)
    short = client.embeddings.create(model=model, input="The end", dimensions=5).data[0].embedding
    assert len(short) == 5
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


def test_chat(client, model, can_chat):
    completion = client.chat.completions.create(
        model=model, messages=HELLO, max_completion_tokens=8, logprobs=True, top_logprobs=3, n=2, seed=1
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.message.role == "assistant" and choice.message.refusal is None
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    assert completion.system_fingerprint.startswith("fp_")
    assert completion.usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_stream(client, model, can_chat):
    asked = dict(model=model, messages=HELLO, max_tokens=8, temperature=0)
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.finish_reason
    assert chunks[-1].usage.total_tokens > 0


def test_files(client, training_file):
    file = client.files.create(file=training_file.open("rb"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.filename == training_file.name and file.expires_at == file.created_at + 3600
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == training_file.read_bytes()
    assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_paging(client, training_file):
    ids = [client.files.create(file=training_file.open("rb"), purpose="fine-tune").id for _ in range(3)]
    assert [file.id for file in client.files.list(limit=1)][:3] == ids[::-1]
    for id in ids:
        client.files.delete(id)


def test_fine_tune(client, model, training_file):
    file = client.files.create(file=training_file.open("rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        suffix="blue",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 2}}},
        extra_body={"lora_r": 4, "max_seq_length": 64},
    )
    for _ in range(600):
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(0.2)
    assert job.status == "succeeded", job.error
    assert job.seed == 7 and job.hyperparameters.n_epochs == 1 and job.hyperparameters.lora_r == 4
    assert job.id in [one.id for one in client.fine_tuning.jobs.list(limit=1)]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert any(job.fine_tuned_model in event.message for event in events)
    assert any(event.type == "metrics" for event in events)
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        assert client.models.retrieve(checkpoint.fine_tuned_model_checkpoint)

    tuned = job.fine_tuned_model
    answer = client.completions.create(model=tuned, prompt="Question 1: ", max_tokens=4)
    assert answer.model == tuned
    with pytest.raises((openai.BadRequestError, openai.ConflictError)):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.models.delete(tuned).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.completions.create(model=tuned, prompt="x")
    assert gone.value.code == "model_not_found"


def test_chat_with_a_tuned_model(client, model, training_file, can_chat):
    file = client.files.create(file=training_file.open("rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=model, training_file=file.id, extra_body={"max_steps": 1})
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        time.sleep(0.2)
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=HELLO, max_tokens=4)
    assert answer.model == job.fine_tuned_model


def test_an_adapter_goes_out_and_comes_back(server, client, model, training_file, tmp_path):
    """As a PEFT folder in a tar archive, with a card of what made it; loaded again it answers the same."""
    file = client.files.create(file=training_file.open("rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=model, training_file=file.id, extra_body={"max_steps": 2, "seed": 3})
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        time.sleep(0.2)
    tuned = job.fine_tuned_model
    route = server + "/v1/adapters/%s/download"
    with urllib.request.urlopen(route % urllib.parse.quote(tuned, safe="")) as answer:
        assert answer.headers["Content-Type"] == "application/x-tar"
        tarfile.open(fileobj=answer, mode="r|").extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    assert sorted(one.name for one in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    card = (folder / "README.md").read_text()
    for expected in [tuned, job.id, file.id, f"| r | {config['r']} |", "| seed | 3 |", "| max_steps | 2 |", "train_loss"]:
        assert expected in card, card
    load = {"lora_name": "came-back", "lora_path": str(folder)}
    client.post("/load_lora_adapter", body=load, cast_to=str)
    asked = dict(prompt="Question 1: ", max_tokens=8, temperature=0, logprobs=1)
    first, again = (client.completions.create(model=name, **asked).choices[0] for name in (tuned, "came-back"))
    assert first.logprobs == again.logprobs
    client.models.delete("came-back")
    for name, status in [(model, 400), ("nobody", 404)]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(route % urllib.parse.quote(name, safe=""))
        assert refused.value.code == status


def test_cancel(client, model, training_file):
    file = client.files.create(file=training_file.open("rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=model, training_file=file.id, hyperparameters={"n_epochs": 50})
    assert client.fine_tuning.jobs.cancel(job.id).id == job.id


@pytest.mark.parametrize(
    "error, ask",
    [
        (openai.NotFoundError, lambda client, model: client.completions.create(model="nobody", prompt="x")),
        (openai.BadRequestError, lambda client, model: client.completions.create(model=model, prompt="x", temperature=3)),
        (openai.BadRequestError, lambda client, model: client.completions.create(model=model, prompt=[1] * 1_000_000)),
        (openai.NotFoundError, lambda client, model: client.files.content("file-unknown")),
        (openai.NotFoundError, lambda client, model: client.fine_tuning.jobs.retrieve("ftjob-unknown")),
        (openai.BadRequestError, lambda client, model: client.fine_tuning.jobs.create(model=model, training_file="no")),
        (openai.BadRequestError, lambda client, model: client.files.create(file=b"{", purpose="fine-tune")),
    ],
)
def test_errors(client, model, error, ask):
    with pytest.raises(error) as raised:
        ask(client, model)
    assert raised.value.request_id and raised.value.body["message"]


def test_too_long(client, model):
    length = client.models.retrieve(model).max_model_len
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=model, prompt=[1] * (length + 1))
    assert raised.value.code == "context_length_exceeded" and f"maximum context length is {length}" in raised.value.message


def test_keys_with_roles_and_owners(tmp_path, training_file):
    """The client's own exceptions: what a key's role may not, and what is another's."""
    server = Process(tmp_path, "serve", "--port", "0", "--api-key", "an-admin")
    try:
        clients = {"admin": client_with(server, "an-admin")}
        for tenant, role in [("acme", "infer"), ("acme", "train"), ("other", "train")]:
            clients[tenant, role] = client_with(server, made(tmp_path, tenant, role))
        admin, asks, trains, other = clients.values()
        for client in (asks, trains, other):
            wait_until_known(client)
        model = asks.models.list().data[0].id
        assert asks.completions.create(model=model, prompt="Hi", max_tokens=1).choices
        with pytest.raises(openai.PermissionDeniedError) as refused:
            asks.files.list()
        assert refused.value.code == "insufficient_permissions"
        with open(training_file, "rb") as rows:
            file = trains.files.create(file=rows, purpose="fine-tune")
        job = trains.fine_tuning.jobs.create(model=model, training_file=file.id, extra_body={"max_steps": 1, "lora_r": 2})
        for look in (
            lambda client: client.files.retrieve(file.id),
            lambda client: client.fine_tuning.jobs.retrieve(job.id),
        ):
            assert look(trains).id == look(admin).id
            with pytest.raises(openai.NotFoundError):
                look(other)
        assert other.files.list().data == [] and list(other.fine_tuning.jobs.list()) == []
        with pytest.raises(openai.AuthenticationError):
            client_with(server, "nobody's").models.list()
    finally:
        server.end()


def client_with(server, key):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def made(folder, tenant, role):
    binary = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")
    command = [binary, "keys", "create", "--tenant", tenant, "--role", role, "--data-dir", folder / "data"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def wait_until_known(client):
    for _ in range(100):
        try:
            return client.models.list()
        except openai.AuthenticationError:
            time.sleep(0.1)
    raise AssertionError("the server did not look at its keys")
