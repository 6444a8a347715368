"""Tools through OpenAI's client: what it sends, and what it makes of the answers. Arguments are judged by jsonschema and
pydantic. The demo model knows no tools, so its template is one of the tests."""

import enum
import json
import pathlib

import jsonschema
import openai
import pydantic
import pytest
from conftest import Process

ASK = [{"role": "user", "content": "Paint the house!"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    template = pathlib.Path(__file__).with_name("tools.jinja")
    # As vLLM's users start it.
    flags = ["--chat-template", str(template), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    process = Process(tmp_path_factory.mktemp("tools"), "serve", "--port", "0", *flags)
    yield openai.OpenAI(base_url=process.url + "/v1", api_key="x", max_retries=0)
    process.end()


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Paint(pydantic.BaseModel):
    """Paint a house."""

    number: int = pydantic.Field(ge=1, le=99)
    color: Color


PAINT = openai.pydantic_function_tool(Paint, name="paint")
NAP = {"type": "function", "function": {"name": "nap", "parameters": {"type": "object", "properties": {"long": {"type": "boolean"}}, "required": ["long"], "additionalProperties": False}}}
SCHEMAS = {"paint": PAINT["function"]["parameters"], "nap": NAP["function"]["parameters"]}
NAMED = {"type": "function", "function": {"name": "paint"}}


def asked(model, **more):
    return dict(model=model, messages=ASK, tools=[PAINT, NAP], max_tokens=150, temperature=1, parallel_tool_calls=False) | more


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_whole_and_streamed(client, model, choice):
    for seed in range(3):
        body = asked(model, tool_choice=choice, seed=seed)
        answer = client.chat.completions.create(**body).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.message.content is None
        assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        pieces, name = [], None
        for chunk in client.chat.completions.create(**body, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                name = name or part.function.name
                pieces.append(part.function.arguments)
        assert (name, "".join(pieces)) == (call.function.name, call.function.arguments)


def test_parse_and_stream_helpers(client, model):
    body = asked(model, tools=[PAINT], tool_choice="required", seed=5)
    message = client.chat.completions.parse(**body).choices[0].message
    parsed = message.tool_calls[0].function.parsed_arguments
    assert isinstance(parsed, Paint)
    with client.chat.completions.stream(**body) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert final.message.tool_calls[0].function.parsed_arguments == parsed
    assert final.message.content is None and final.finish_reason == "tool_calls"


def test_a_turn_with_its_results(client, model):
    message = client.chat.completions.create(**asked(model, tool_choice="required", seed=1)).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    for history in [message, message.model_dump(), message.model_dump(exclude_none=True)]:
        answer = client.chat.completions.create(**asked(model, messages=[*ASK, history, result], max_tokens=5))
        assert answer.usage.completion_tokens == 5 or answer.choices[0].finish_reason != "length"


def test_the_older_form(client, model):
    body = dict(model=model, messages=ASK, functions=[PAINT["function"]], function_call={"name": "paint"}, max_tokens=150)
    call = client.chat.completions.create(**body).choices[0].message.function_call
    assert call.name == "paint"
    Paint.model_validate_json(call.arguments)
    pieces = [chunk.choices[0].delta.function_call for chunk in client.chat.completions.create(**body, stream=True, temperature=0)]
    assert "".join(piece.arguments for piece in pieces if piece) != ""


def test_refusals(client, model):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked(model, tool_choice={"type": "function", "function": {"name": "dig"}}))
    assert refused.value.param == "tool_choice.function.name"
