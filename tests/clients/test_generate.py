"""text-generation-inference's API through Hugging Face's client, which posts to `/`, whole and streamed."""

import json

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError


http = httpx2.Client(timeout=120)
# As the demo model's chat template renders it, without the first token.
ASK = "<|user|>Where does Felix live?<|end|><|assistant|>"


@pytest.fixture(scope="module")
def client(server):
    return InferenceClient(model=server)


def whole(client, **more):
    return client.text_generation(ASK, details=True, **dict(max_new_tokens=30) | more)


STREAMED = [
    {},
    {"do_sample": True, "seed": 5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    {"max_new_tokens": 3},
    {"stop": ["e"]},
    {"return_full_text": True},
    {"truncate": 4},
    {"top_n_tokens": 2},
    {"grammar": {"type": "regex", "value": "[a-c]{5}"}},
    {"grammar": {"type": "json", "value": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}}},
]


@pytest.mark.parametrize("body", STREAMED, ids=range(len(STREAMED)))
def test_a_stream_says_what_the_whole_says(client, body):
    answer = whole(client, **body)
    details = answer.details
    events = list(client.text_generation(ASK, details=True, stream=True, **dict(max_new_tokens=30) | body))
    last = events[-1]
    before = ASK if body.get("return_full_text") else ""
    assert before + "".join(event.token.text for event in events) == answer.generated_text == last.generated_text
    assert [event.token.id for event in events] == [token.id for token in details.tokens]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    assert last.details.finish_reason == details.finish_reason
    assert last.details.generated_tokens == details.generated_tokens == len(events)
    plain = "".join(client.text_generation(ASK, stream=True, **dict(max_new_tokens=30) | body))
    assert before + plain == answer.generated_text
    if "top_n_tokens" not in body:
        assert client.text_generation(ASK, **dict(max_new_tokens=30) | body) == answer.generated_text
    if "top_n_tokens" in body:
        assert all(len(top) == 2 for top in details.top_tokens)
        assert all(top[0]["logprob"] >= top[1]["logprob"] for top in details.top_tokens)


def test_why_it_ends(client):
    assert whole(client).details.finish_reason in ("eos_token", "length")
    assert whole(client, max_new_tokens=2).details.finish_reason == "length"
    stopped = whole(client, stop=["e"])
    assert stopped.details.finish_reason == "stop_sequence" and stopped.generated_text.endswith("e")


def test_prompts(client, server):
    scored = whole(client, decoder_input_details=True)
    assert scored.details.prefill[0].logprob is None and all(token.logprob < 0 for token in scored.details.prefill[1:])
    assert whole(client, decoder_input_details=True, truncate=4).details.prefill[-3:] != [] and len(whole(client, decoder_input_details=True, truncate=4).details.prefill) == 4
    same = http.post(server + "/v1/completions", json={"model": "tandem-demo", "prompt": ASK, "max_tokens": 30, "temperature": 0}).json()
    assert client.text_generation(ASK, max_new_tokens=30) == same["choices"][0]["text"]


def test_the_other_routes(server):
    body = {"inputs": ASK, "parameters": {"max_new_tokens": 5}}
    one = http.post(server + "/generate", json=body).json()
    assert http.post(server + "/", json=body).json() == [one] and set(one) == {"generated_text"}
    streamed = http.post(server + "/generate_stream", json=body)
    assert streamed.headers["content-type"] == "text/event-stream"
    events = [json.loads(line.removeprefix("data:")) for line in streamed.text.splitlines() if line.startswith("data:")]
    assert events[-1]["generated_text"] == one["generated_text"]
    info = http.get(server + "/info").json()
    assert info["model_id"] == "tandem-demo" and info["max_total_tokens"] == info["max_input_tokens"] + 1
    assert http.get(server + "/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "parameters, status, part",
    [
        ({"adapter_id": "nobody"}, 404, "`nobody` does not exist"),
        ({"best_of": 2}, 400, "best_of"),
        ({"typical_p": 0.9}, 400, "typical_p"),
        ({"watermark": True}, 400, "watermark"),
        ({"max_new_tokens": 0}, 400, "max_new_tokens"),
        ({"temperature": -1.0}, 400, "temperature"),
        ({"grammar": {"type": "json", "value": {"type": "array", "uniqueItems": True}}}, 400, "grammar.value"),
        ({"grammar": {"type": "xml", "value": ""}}, 400, "grammar.type"),
        ({"decoder_input_details": True}, 400, "details"),
        ({"max_tokens": 4}, 400, "max_new_tokens"),
        ({"max_new_token": 4}, 400, "did you mean"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(server, parameters, status, part):
    for path in ["/", "/generate", "/generate_stream"]:
        answer = http.post(server + path, json={"inputs": ASK, "parameters": parameters})
        body = answer.json()
        assert answer.status_code == status and set(body) == {"error", "error_type"}, body
        assert body["error_type"] == "validation" and part in body["error"], body


def test_refusals_of_the_client(client):
    with pytest.raises(ValidationError):
        client.text_generation(ASK, adapter_id="nobody")
    with pytest.raises(ValidationError):
        client.text_generation(ASK, best_of=2)
