"""Anthropic's client: what it sends, and what it makes of the answers. Arguments are judged by jsonschema, the order of a stream's
events by the list that Anthropic's documentation gives. The demo model knows no tools, so its template is one of the tests."""

import json
import pathlib

import anthropic
import jsonschema
import pydantic
import pytest
from conftest import Process

ASK = [{"role": "user", "content": "Where does Felix live?"}]
PAINT = {"name": "paint", "description": "Paint a house.", "input_schema": {"type": "object", "additionalProperties": False, "required": ["number", "color"], "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}, "color": {"enum": ["red", "blue"]}}}}
NAP = {"type": "custom", "name": "nap", "input_schema": {"type": "object", "additionalProperties": False, "required": ["long"], "properties": {"long": {"type": "boolean"}}}}
SCHEMAS = {tool["name"]: tool["input_schema"] for tool in [PAINT, NAP]}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    template = pathlib.Path(__file__).with_name("tools.jinja")
    flags = ["--chat-template", str(template), "--tool-call-parser", "hermes", "--api-key", "sekret"]
    process = Process(tmp_path_factory.mktemp("anthropic"), "serve", "--port", "0", *flags)
    yield process
    process.end()


@pytest.fixture(scope="module")
def client(process):
    return anthropic.Anthropic(base_url=process.url, api_key="sekret", max_retries=0)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model that begins with reasoning, and (the demo model being what it is) never ends it."""
    process = Process(tmp_path_factory.mktemp("thinker"), "serve", "--port", "0", "--reasoning-parser", "deepseek_r1")
    yield anthropic.Anthropic(base_url=process.url, api_key="x", max_retries=0)
    process.end()


def asked(extra=None, **more):
    """`extra`: what Anthropic's client of today has no parameters for, and older ones and other clients send."""
    return dict(model="tandem-demo", messages=ASK, max_tokens=40, extra_body={"temperature": 0} | (extra or {})) | more


def called(extra=None, **more):
    return asked({"temperature": 1, "seed": 3} | (extra or {})) | dict(tools=[PAINT, NAP], max_tokens=200) | more


def told(message):
    """All that a message says, without what differs from answer to answer."""
    blocks = [block.model_dump(exclude={"id"}) for block in message.content]
    return blocks, message.stop_reason, message.stop_sequence, message.usage.output_tokens


def in_order(events):
    """The documented order; returns how many blocks there are."""
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    start = events[0].message
    assert start.content == [] and start.stop_reason is None and start.usage.output_tokens == 0
    index, is_open = 0, False
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert not is_open and event.index == index
            is_open = True
        elif event.type == "content_block_delta":
            assert is_open and event.index == index
        else:
            assert event.type == "content_block_stop" and is_open and event.index == index
            is_open, index = False, index + 1
    assert not is_open
    return index


STREAMED = [
    asked(),
    asked(system="Be brief.", stop_sequences=["e"]),
    asked(system=[{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}], max_tokens=3),
    asked({"temperature": 1, "top_p": 0.9, "top_k": 20, "seed": 7}, metadata={"user_id": "me"}),
    called(tool_choice={"type": "any"}),
    called(tool_choice={"type": "any", "disable_parallel_tool_use": True}),
    called(tool_choice={"type": "tool", "name": "nap"}),
    called(tool_choice={"type": "any"}, max_tokens=10),
    called(tool_choice={"type": "none"}, max_tokens=20),
    asked(output_config={"format": {"type": "json_schema", "schema": NAP["input_schema"]}}),
]


@pytest.mark.parametrize("body", STREAMED, ids=range(len(STREAMED)))
def test_a_stream_says_what_the_whole_says(client, body):
    whole = client.messages.create(**body)
    assert whole.id.startswith("msg_") and whole.type == "message" and whole.role == "assistant" and whole.model == "tandem-demo"
    events = list(client.messages.create(**body, stream=True))
    assert in_order(events) == len(whole.content)
    blocks = []
    for event in events:
        if event.type == "content_block_start":
            blocks.append("")
        elif event.type == "content_block_delta":
            delta = event.delta
            blocks[-1] += {"text_delta": lambda: delta.text, "input_json_delta": lambda: delta.partial_json}[delta.type]()
    for text, block in zip(blocks, whole.content, strict=True):
        if block.type == "text":
            assert text == block.text
        elif "INVALID_JSON" in block.input:
            assert text == block.input["INVALID_JSON"] and whole.stop_reason == "max_tokens"
        else:
            assert json.loads(text) == block.input
    last = events[-2]
    assert (last.delta.stop_reason, last.delta.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    total = lambda usage: (usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens, usage.output_tokens)
    assert total(last.usage) == total(whole.usage)


def test_why_it_stops(client):
    assert client.messages.create(**asked()).stop_reason == "end_turn"
    assert client.messages.create(**asked(max_tokens=2)).stop_reason == "max_tokens"
    stopped = client.messages.create(**asked(stop_sequences=["zzz", "e"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "e")
    assert "e" not in stopped.content[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}, {"type": "any", "disable_parallel_tool_use": True}], ids=["any", "tool", "one"])
def test_what_must_be_called_is_called_and_valid(client, choice):
    for seed in range(3):
        message = client.messages.create(**called({"seed": seed}, tool_choice=choice))
        calls = [block for block in message.content if block.type == "tool_use"]
        assert calls == message.content
        assert message.stop_reason == "tool_use" or (message.stop_reason == "max_tokens" and len(calls) > 1)
        for call in calls[: len(calls) - (message.stop_reason == "max_tokens")]:
            assert call.id.startswith("toolu_")
            jsonschema.validate(call.input, SCHEMAS[call.name])
        assert len({call.id for call in calls}) == len(calls)
        if "name" in choice or "disable_parallel_tool_use" in choice:
            assert len(calls) == 1


def test_the_stream_helper(client):
    with client.messages.stream(**called(tool_choice={"type": "tool", "name": "paint"})) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds
    jsonschema.validate(final.content[0].input, SCHEMAS["paint"])
    with client.messages.stream(**asked()) as stream:
        text = "".join(stream.text_stream)
    assert told(stream.get_final_message()) == told(client.messages.create(**asked())) and text == stream.get_final_message().content[0].text


def test_parse(client):
    class Nap(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        long: bool

    message = client.messages.parse(**asked({"temperature": 1, "seed": 3}, max_tokens=400), output_format=Nap)
    assert isinstance(message.parsed_output, Nap)


def test_a_turn_with_its_results(client):
    message = client.messages.create(**called(tool_choice={"type": "any"}))
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "done"}]} for block in message.content if block.type == "tool_use"]
    history = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]}]
    answer = client.messages.create(**called(messages=history, max_tokens=5))
    assert answer.usage.output_tokens > 0
    counted = client.messages.count_tokens(model="tandem-demo", messages=history, tools=[PAINT, NAP])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_the_answer_goes_on(client):
    whole = client.messages.create(**asked()).content[0].text
    first, rest = whole.split(" ", 1)
    messages = [*ASK, {"role": "assistant", "content": first}]
    assert client.messages.create(**asked(messages=messages)).content[0].text == " " + rest


def test_tokens_are_counted(client):
    for body in [asked(), asked(system="Be brief."), called(messages=ASK * 2)]:
        wanted = {name: body[name] for name in ["model", "messages", "system", "tools"] if name in body}
        usage = client.messages.create(**body).usage
        assert client.messages.count_tokens(**wanted).input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_thinking(thinker):
    ask = asked(thinking={"type": "enabled", "budget_tokens": 100}, max_tokens=200)
    whole = thinker.messages.create(**ask | {"stop_sequences": ["."]})
    assert [block.type for block in whole.content] == ["thinking"] and whole.content[0].thinking
    events = list(thinker.messages.create(**ask | {"stop_sequences": ["."]}, stream=True))
    assert in_order(events) == 1
    assert "".join(event.delta.thinking for event in events if event.type == "content_block_delta") == whole.content[0].thinking
    history = [*ASK, {"role": "assistant", "content": [*whole.content, {"type": "text", "text": "There."}]}, *ASK]
    thinker.messages.create(**asked(messages=history, max_tokens=4))
    hidden = thinker.messages.create(**ask | {"stop_sequences": ["."], "thinking": {"type": "adaptive", "display": "omitted"}})
    assert [block.model_dump(include={"type", "text"}) for block in hidden.content] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    "body, error, kind, part",
    [
        (asked(model="nobody"), anthropic.NotFoundError, "not_found_error", "nobody"),
        (asked(max_tokens=0), anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
        (asked(messages=[]), anthropic.BadRequestError, "invalid_request_error", "messages is empty"),
        (asked(messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}]), anthropic.BadRequestError, "invalid_request_error", "image"),
        (called(tool_choice={"type": "tool", "name": "dig"}), anthropic.BadRequestError, "invalid_request_error", "tool_choice.name"),
        (asked(tools=[{"type": "web_search_20250305", "name": "web_search"}]), anthropic.BadRequestError, "invalid_request_error", "web_search_20250305"),
        (asked(tools=[{"name": "f", "input_schema": {"type": "array"}}]), anthropic.BadRequestError, "invalid_request_error", "tools[0].input_schema.type"),
        (asked(thinking={"type": "enabled", "budget_tokens": 20}), anthropic.BadRequestError, "invalid_request_error", "thinking is not supported"),
        (asked({"stop": ["a"]}), anthropic.BadRequestError, "invalid_request_error", "use stop_sequences"),
        (asked(messages=[{"role": "user", "content": "long " * 5000}]), anthropic.BadRequestError, "invalid_request_error", "maximum context length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(client, body, error, kind, part):
    for stream in [False, True]:
        with pytest.raises(error) as refused:
            client.messages.create(**body, stream=stream)
        answer = refused.value.body
        assert answer["type"] == "error" and set(answer) == {"type", "error", "request_id"}
        assert answer["error"]["type"] == kind and part in answer["error"]["message"], answer
        assert answer["request_id"] == refused.value.request_id == refused.value.response.headers["x-request-id"]


def test_keys(process):
    ask = lambda **more: anthropic.Anthropic(base_url=process.url, max_retries=0, **more).messages.create(**asked(max_tokens=2))
    ask(api_key="sekret")
    ask(auth_token="sekret")
    anthropic.Anthropic(base_url=process.url, api_key="x", max_retries=0, default_headers={"x-api-key": "sekret", "Authorization": anthropic.Omit()}).messages.create(**asked(max_tokens=2))
    with pytest.raises(anthropic.AuthenticationError) as refused:
        ask(api_key="wrong")
    assert refused.value.body["error"]["type"] == "authentication_error"


@pytest.mark.anyio
async def test_async(process):
    client = anthropic.AsyncAnthropic(base_url=process.url, api_key="sekret", max_retries=0)
    whole = await client.messages.create(**asked())
    async with client.messages.stream(**asked()) as stream:
        final = await stream.get_final_message()
    assert told(whole) == told(final)


@pytest.fixture
def anyio_backend():
    return "asyncio"
