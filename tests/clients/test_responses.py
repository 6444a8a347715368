"""The Responses API through OpenAI's client and two libraries of agents that use it: what they send, and what they make of the
answers. The demo model knows no tools, so its template is one of the tests."""

import asyncio
import json
import pathlib

import jsonschema
import openai
import pydantic
import pytest
from conftest import Process

ASK = "Where does Felix live?"
PAINT = {"type": "function", "name": "paint", "description": "Paint a house.", "strict": True, "parameters": {"type": "object", "additionalProperties": False, "required": ["number", "color"], "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}, "color": {"enum": ["red", "blue"]}}}}
NAP = {"type": "function", "name": "nap", "parameters": {"type": "object", "additionalProperties": False, "required": ["long"], "properties": {"long": {"type": "boolean"}}}}
SCHEMAS = {tool["name"]: tool["parameters"] for tool in [PAINT, NAP]}
# What differs from answer to answer.
FRESH = {"id", "created_at", "completed_at", "call_id"}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    template = pathlib.Path(__file__).with_name("tools.jinja")
    flags = ["--chat-template", str(template), "--tool-call-parser", "hermes"]
    process = Process(tmp_path_factory.mktemp("responses"), "serve", "--port", "0", *flags)
    yield process
    process.end()


@pytest.fixture(scope="module")
def client(process):
    return openai.OpenAI(base_url=process.url + "/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model that begins with reasoning, and (the demo model being what it is) never ends it."""
    process = Process(tmp_path_factory.mktemp("thinker"), "serve", "--port", "0", "--reasoning-parser", "deepseek_r1")
    yield openai.OpenAI(base_url=process.url + "/v1", api_key="x", max_retries=0)
    process.end()


def asked(**more):
    return dict(model="tandem-demo", input=ASK, max_output_tokens=40, temperature=0) | more


def called(**more):
    return asked(tools=[PAINT, NAP], max_output_tokens=200, temperature=1, parallel_tool_calls=False, extra_body={"seed": 3}) | more


def lasting(value):
    """Without what differs from answer to answer."""
    match value:
        case dict():
            # Tokens of the prompt may be in the cache or not.
            return {key: lasting(inner) for key, inner in value.items() if key not in FRESH and key != "input_tokens_details"}
        case list():
            return [lasting(inner) for inner in value]
    return value


def in_order(events):
    """The documented order, and that what is done is what the deltas join to. Returns the last response."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == events[1].response.status == "in_progress" and events[0].response.output == []
    final = events[-1].response
    middle, index = iter(events[2:-1]), 0
    for added in middle:
        assert added.type == "response.output_item.added" and added.output_index == index
        assert added.item.status == "in_progress"
        kind, text = added.item.type, ""
        names = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        if kind != "function_call":
            part = next(middle)
            assert part.type == "response.content_part.added" and part.part.type == names[kind] and part.part.text == ""
            assert part.content_index == 0 and part.item_id == added.item.id
        for event in middle:
            assert event.output_index == index and event.item_id == added.item.id
            if event.type == f"response.{names[kind]}.delta":
                text += event.delta
                continue
            assert event.type == f"response.{names[kind]}.done"
            assert (event.arguments if kind == "function_call" else event.text) == text
            break
        if kind != "function_call":
            part = next(middle)
            assert part.type == "response.content_part.done" and part.part.text == text
        done = next(middle)
        assert done.type == "response.output_item.done" and done.item.id == added.item.id
        assert done.item.to_dict() == final.output[index].to_dict()
        said = done.item.arguments if kind == "function_call" else done.item.content[0].text
        assert said == text
        index += 1
    assert index == len(final.output)
    assert events[-1].type == f"response.{final.status}"
    return final


STREAMED = [
    asked(),
    asked(instructions="Be brief.", metadata={"a": "b"}, user="me", store=False),
    asked(input=[{"role": "user", "content": [{"type": "input_text", "text": ASK}]}], max_output_tokens=3),
    asked(temperature=1, top_p=0.9, extra_body={"seed": 7, "top_k": 20}, reasoning={"summary": "auto"}),
    asked(include=["message.output_text.logprobs", "reasoning.encrypted_content"], top_logprobs=2),
    called(tool_choice="required"),
    called(tool_choice={"type": "function", "name": "nap"}),
    called(tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "nap"}]}),
    called(tool_choice="required", max_output_tokens=10),
    called(tool_choice="none", max_output_tokens=20),
    asked(temperature=1, max_output_tokens=300, extra_body={"seed": 3}, text={"format": {"type": "json_schema", "name": "nap", "schema": NAP["parameters"], "strict": True}}),
]


@pytest.mark.parametrize("body", STREAMED, ids=range(len(STREAMED)))
def test_a_stream_says_what_the_whole_says(client, body):
    whole = client.responses.create(**body)
    assert whole.id.startswith("resp_") and whole.model == "tandem-demo" and whole.error is None
    final = in_order(list(client.responses.create(**body, stream=True)))
    assert lasting(final.to_dict()) == lasting(whole.to_dict())
    is_cut = body["max_output_tokens"] <= 10
    assert whole.status == ("incomplete" if is_cut else "completed")
    assert (whole.incomplete_details.reason if is_cut else whole.incomplete_details) == ("max_output_tokens" if is_cut else None)
    for call in whole.output:
        if call.type == "function_call" and not is_cut:
            assert call.call_id.startswith("call_") and call.id.startswith("fc_")
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    if "include" in body:
        tokens = whole.output[0].content[0].logprobs
        assert "".join(token.token for token in tokens).startswith(whole.output_text) and all(len(token.top_logprobs) == 2 for token in tokens)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    for field in ["instructions", "metadata", "user", "temperature", "top_p", "max_output_tokens"]:
        if field in body:
            assert getattr(whole, field) == body[field]


def test_parse_and_stream_helpers(client):
    class Nap(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        long: bool

    parsed = client.responses.parse(**asked(temperature=1, max_output_tokens=300), text_format=Nap)
    assert isinstance(parsed.output_parsed, Nap)
    with client.responses.stream(**asked(temperature=1, max_output_tokens=300), text_format=Nap) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Nap) and "response.output_text.delta" in kinds
    with client.responses.stream(**called(tools=[openai.pydantic_function_tool(Nap, name="nap")], tool_choice="required")) as stream:
        assert "response.function_call_arguments.delta" in [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert isinstance(call.parsed_arguments, Nap)


def test_kept_listed_and_forgotten(client):
    made = client.responses.create(**asked(input=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": ASK}], metadata={"a": "b"}))
    assert made.store is True and client.responses.retrieve(made.id).to_dict() == made.to_dict()
    items = list(client.responses.input_items.list(made.id, limit=2))
    assert [item.content[0].text for item in items] == [ASK, "Hello", "Hi"]
    assert [item.id for item in client.responses.input_items.list(made.id, order="asc")] == [item.id for item in reversed(items)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.cancel(made.id)
    assert "background" in str(refused.value)
    client.responses.delete(made.id)
    for forgotten in [lambda: client.responses.retrieve(made.id), lambda: client.responses.delete(made.id), lambda: client.responses.input_items.list(made.id)]:
        with pytest.raises(openai.NotFoundError):
            forgotten()
    unkept = client.responses.create(**asked(store=False))
    assert unkept.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on(client, stream):
    def ask(**more):
        answer = client.responses.create(**asked(**more), stream=stream)
        return list(answer)[-1].response if stream else answer

    first = ask()
    second = ask(input="And Anna?", previous_response_id=first.id)
    third = ask(input="And Ben?", previous_response_id=second.id, instructions="Be brief.")
    history = [{"role": "user", "content": ASK}, *[item.to_dict() for item in first.output], {"role": "user", "content": "And Anna?"}]
    assert second.output_text == client.responses.create(**asked(input=history)).output_text
    assert second.usage.input_tokens == client.responses.create(**asked(input=history)).usage.input_tokens
    history += [*[item.to_dict() for item in second.output], {"role": "user", "content": "And Ben?"}]
    whole = client.responses.create(**asked(input=history, instructions="Be brief."))
    assert third.output_text == whole.output_text and third.usage.input_tokens == whole.usage.input_tokens
    assert third.previous_response_id == second.id
    counted = client.responses.input_tokens.count(model="tandem-demo", input="And Ben?", previous_response_id=second.id, instructions="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**asked(previous_response_id=second.id))
    assert refused.value.code == "previous_response_not_found" and first.id in str(refused.value)


def test_a_turn_with_its_results(client):
    made = client.responses.create(**called(tool_choice="required", input=[{"role": "user", "content": ASK}]))
    (call,) = made.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    history = [{"role": "user", "content": ASK}, call.to_dict(), result]
    after = client.responses.create(**called(input=history, max_output_tokens=5, temperature=0))
    same = client.responses.create(**called(input=[result], previous_response_id=made.id, max_output_tokens=5, temperature=0))
    assert after.output_text == same.output_text and after.usage.input_tokens == same.usage.input_tokens


def test_reasoning(thinker):
    whole = thinker.responses.create(**asked(max_output_tokens=4))
    (item,) = whole.output
    assert item.type == "reasoning" and item.content[0].text and item.summary == [] and item.status == whole.status == "incomplete"
    assert whole.usage.output_tokens_details.reasoning_tokens == whole.usage.output_tokens == 4
    final = in_order(list(thinker.responses.create(**asked(max_output_tokens=4), stream=True)))
    assert lasting(final.to_dict()) == lasting(whole.to_dict())
    history = [{"role": "user", "content": ASK}, item.to_dict(), {"role": "assistant", "content": "There."}, {"role": "user", "content": ASK}]
    thinker.responses.create(**asked(input=history, max_output_tokens=4))


@pytest.mark.parametrize(
    "body, error, param, part",
    [
        (asked(model="nobody"), openai.NotFoundError, "model", "nobody"),
        (asked(input=[]), openai.BadRequestError, "input", "empty"),
        (asked(input=[{"role": "boss", "content": "a"}]), openai.BadRequestError, "input[0].role", "boss"),
        (asked(input=[{"role": "user", "content": [{"type": "input_image", "detail": "auto"}]}]), openai.BadRequestError, "input[0].content[0].type", "input_image"),
        (asked(input=[{"type": "item_reference", "id": "msg_1"}]), openai.BadRequestError, "input[0].type", "item_reference"),
        (asked(tools=[{"type": "web_search"}]), openai.BadRequestError, "tools[0].type", "web_search"),
        (asked(tools=[{"type": "function", "name": "f", "parameters": {"type": "array"}}]), openai.BadRequestError, "tools[0].parameters.type", "object"),
        (called(tool_choice={"type": "function", "name": "dig"}), openai.BadRequestError, "tool_choice.name", "dig"),
        (asked(max_output_tokens=0), openai.BadRequestError, "max_output_tokens", "at least 1"),
        (asked(text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "array", "uniqueItems": True}}}), openai.BadRequestError, "text.format.schema", "uniqueItems"),
        (asked(background=True), openai.BadRequestError, "background", "not supported"),
        (asked(truncation="auto"), openai.BadRequestError, "truncation", "not supported"),
        (asked(conversation="conv_1"), openai.BadRequestError, "conversation", "previous_response_id"),
        (asked(include=["everything"]), openai.BadRequestError, "include[0]", "everything"),
        (asked(reasoning={"summary": "detailed"}), openai.BadRequestError, "reasoning.summary", "summaries"),
        (asked(previous_response_id="resp_none"), openai.BadRequestError, "previous_response_id", "resp_none"),
        (asked(extra_body={"max_tokens": 3}), openai.BadRequestError, "max_tokens", "max_output_tokens"),
        (asked(input="long " * 5000), openai.BadRequestError, "input", "maximum context length"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_refusals(client, body, error, param, part):
    for stream in [False, True]:
        with pytest.raises(error) as refused:
            client.responses.create(**body, stream=stream)
        assert refused.value.param == param and part in str(refused.value), refused.value


def test_agents(process, monkeypatch):
    """openai-agents: a function is called, its result read, a session goes on by previous_response_id; whole and streamed."""
    agents = pytest.importorskip("agents")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    heard = []

    @agents.function_tool
    def nap(long: bool) -> str:
        """Sleep."""
        heard.append(long)
        return "slept"

    model = agents.OpenAIResponsesModel(model="tandem-demo", openai_client=openai.AsyncOpenAI(base_url=process.url + "/v1", api_key="x", max_retries=0))
    settings = agents.ModelSettings(tool_choice="required", temperature=1, max_tokens=400, extra_body={"seed": 3})
    agent = agents.Agent(name="A", instructions="Sleep.", model=model, tools=[nap], model_settings=settings, tool_use_behavior="stop_on_first_tool")
    talker = agents.Agent(name="B", model=model, model_settings=agents.ModelSettings(temperature=0, max_tokens=20))

    async def talk():
        result = await agents.Runner.run(agent, ASK)
        assert result.final_output == "slept" and len(heard) == 1
        first = await agents.Runner.run(talker, ASK)
        again = await agents.Runner.run(talker, ASK, previous_response_id=first.last_response_id)
        history = await agents.Runner.run(talker, [*first.to_input_list(), {"role": "user", "content": ASK}])
        assert history.final_output == again.final_output
        running = agents.Runner.run_streamed(talker, ASK)
        async for _ in running.stream_events():
            pass
        assert running.final_output == first.final_output and isinstance(first.final_output, str)

    asyncio.run(talk())


def test_pydantic_ai(process):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Nap(pydantic.BaseModel):
        """Sleep."""

        model_config = pydantic.ConfigDict(extra="forbid")
        long: bool

    provider = OpenAIProvider(base_url=process.url + "/v1", api_key="x")
    model = OpenAIResponsesModel("tandem-demo", provider=provider)
    settings = {"temperature": 1.0, "max_tokens": 400, "extra_body": {"seed": 3}}
    result = Agent(model, model_settings=settings).run_sync(ASK)
    assert result.output and result.usage.output_tokens > 0
    history = Agent(model, model_settings=settings).run_sync("And Anna?", message_history=result.all_messages())
    assert isinstance(history.output, str)
    assert isinstance(Agent(model, output_type=Nap, model_settings=settings).run_sync(ASK).output, Nap)
