"""Batches and uploads in parts with OpenAI's client: every end of a batch, each line once also after `kill -9`."""

import hashlib
import json
import time

import openai
import pytest
from conftest import Process

ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)


def line(custom_id, url, body):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def begin(client, text, endpoint, **more):
    file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client, batch, until=lambda batch: batch.status in ENDED):
    for _ in range(1200):
        batch = client.batches.retrieve(batch.id)
        if until(batch):
            return batch
        time.sleep(0.1)
    raise AssertionError(batch)


def lines(client, file):
    return [json.loads(line) for line in client.files.content(file).text.splitlines()] if file else []


def bodies(model):
    """One body for each endpoint, and the same asked alive."""
    hello = [{"role": "user", "content": "Where does Felix live?"}]
    greedy = {"model": model, "temperature": 0}
    return {
        "/v1/chat/completions": ({**greedy, "messages": hello, "max_tokens": 12}, lambda c, b: c.chat.completions.create(**b)),
        "/v1/completions": ({**greedy, "prompt": "Once upon", "max_tokens": 12}, lambda c, b: c.completions.create(**b)),
        "/v1/embeddings": ({"model": model, "input": "The bakery"}, lambda c, b: c.embeddings.create(**b, encoding_format="float")),
        "/v1/responses": ({**greedy, "input": "Hello", "max_output_tokens": 16}, lambda c, b: c.responses.create(**b)),
    }


def said(endpoint, body):
    if endpoint == "/v1/embeddings":
        return body["data"][0]["embedding"]
    if endpoint == "/v1/responses":
        return body["output"][0]["content"][0]["text"]
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_answers_are_those_of_the_route(client, endpoint):
    model = client.models.list().data[0].id
    body, alive = bodies(model)[endpoint]
    batch = begin(client, "".join(line(f"r{i}", endpoint, body) for i in range(5)), endpoint, metadata={"a": "b"})
    assert batch.object == "batch" and batch.endpoint == endpoint and batch.metadata == {"a": "b"}
    assert batch.expires_at == batch.created_at + 24 * 3600
    batch = wait(client, batch)
    assert batch.status == "completed" and batch.error_file_id is None and batch.errors is None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 5, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = lines(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(5)]
    expected = said(endpoint, alive(client, body).model_dump())
    for one in output:
        assert one["error"] is None and one["response"]["status_code"] == 200 and one["id"].startswith("batch_req_")
        assert said(endpoint, one["response"]["body"]) == expected


def test_bad_lines_fail_alone_and_bad_files_whole(client):
    model = client.models.list().data[0].id
    endpoint = "/v1/chat/completions"
    good = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    text = (
        line("good", endpoint, good) + "{nonsense\n" + line("other", endpoint, {**good, "model": "no"})
        + line("hot", endpoint, {**good, "temperature": 9}) + line("good", endpoint, good)
    )
    batch = wait(client, begin(client, text, endpoint))
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 1, 4)
    assert [line["custom_id"] for line in lines(client, batch.output_file_id)] == ["good"]
    errors = lines(client, batch.error_file_id)
    assert [line["custom_id"] for line in errors] == [None, "other", "hot", "good"]
    assert errors[0]["error"]["code"] == "invalid_json_line" and errors[0]["error"]["line"] == 2
    assert errors[1]["error"]["code"] == "mismatched_model" and errors[1]["error"]["param"] == "body.model"
    assert errors[2]["response"]["body"]["error"]["param"] == "temperature"
    assert errors[3]["error"]["code"] == "duplicate_custom_id"

    batch = wait(client, begin(client, line("unknown", endpoint, {**good, "model": "no"}), endpoint))
    [error] = lines(client, batch.error_file_id)
    assert error["response"]["status_code"] == 404

    batch = wait(client, begin(client, "\n".join(["nonsense"] * 3), endpoint))
    assert batch.status == "failed" and batch.output_file_id is None
    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", n) for n in (1, 2, 3)]
    ids = [one.id for one in client.batches.list(limit=1)]
    assert ids[0] == batch.id and len(ids) == len(set(ids)) > 1
    for wrong in (dict(endpoint="/v1/audio"), dict(completion_window="soon"), dict(input_file_id="file-no")):
        asked = dict(input_file_id=batch.input_file_id, endpoint=endpoint, completion_window="24h")
        with pytest.raises(openai.BadRequestError) as error:
            client.batches.create(**{**asked, **wrong})
        assert error.value.param == next(iter(wrong))
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_no")


def long_text(model, n):
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}
    return "".join(line(f"r{i}", "/v1/completions", {**body, "seed": i}) for i in range(n))


def test_cancel(client):
    model = client.models.list().data[0].id
    batch = begin(client, long_text(model, 2000), "/v1/completions")
    wait(client, batch, lambda batch: batch.request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = wait(client, batch)
    assert batch.status == "cancelled" and batch.cancelling_at <= batch.cancelled_at
    assert len(lines(client, batch.output_file_id)) == batch.request_counts.completed < 2000
    again = client.batches.cancel(batch.id)
    assert again.status == "cancelled"


def test_killed_and_gone_on_with(tmp_path):
    server = Process(tmp_path, "serve", "--port", "0")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    batch = begin(client, long_text(model, 300), "/v1/completions")
    before = wait(client, batch, lambda batch: batch.request_counts.completed >= 20)
    server.process.kill()
    server.process.wait()

    server = Process(tmp_path, "serve", "--port", "0")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    after = client.batches.retrieve(batch.id)
    assert after.status == "in_progress" and after.request_counts.completed >= before.request_counts.completed
    batch = wait(client, batch)
    assert batch.status == "completed" and batch.request_counts.completed == 300
    assert [one["custom_id"] for one in lines(client, batch.output_file_id)] == [f"r{i}" for i in range(300)]
    server.end()


def test_uploads(client, tmp_path):
    content = b"".join(b'{"prompt": "Question %d: ", "completion": " blue."}\n' % i for i in range(200))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=999, md5=md5
    )
    assert upload.status == "completed" and upload.file.bytes == upload.bytes == len(content)
    assert client.files.content(upload.file.id).read() == content

    upload = client.uploads.create(filename="a.jsonl", purpose="batch", bytes=4, mime_type="text/jsonl")
    assert upload.status == "pending" and upload.expires_at == upload.created_at + 3600
    part = client.uploads.parts.create(upload.id, data=b"ab")
    assert part.object == "upload.part" and part.upload_id == upload.id
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[part.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"cde")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"cd")
