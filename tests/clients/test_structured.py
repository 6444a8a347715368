"""Answers bound to a schema, judged by jsonschema and pydantic, which do not know how they were made."""

import enum
import json
from typing import Literal, Optional, Union

import jsonschema
import openai
import pydantic
import pytest

ASK = [{"role": "user", "content": "Who lives in the red house?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server + "/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


STRING = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "numbers": {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3, "exclusiveMaximum": 40}, "b": {"type": "number", "multipleOf": 0.5, "maximum": 9}}, "required": ["a", "b"], "additionalProperties": False},
    "strings": {"type": "object", "properties": {"p": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, "l": {"type": "string", "minLength": 3, "maxLength": 5}, "d": {"type": "string", "format": "date"}}, "required": ["p", "l", "d"], "additionalProperties": False},
    "arrays": {"type": "array", "minItems": 2, "maxItems": 4, "prefixItems": [{"const": "first"}, {"type": "boolean"}], "items": {"enum": [1, None, {"x": [2]}, "y"]}},
    "unions": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"kind": {"const": "a"}, "v": STRING}, "required": ["kind", "v"], "additionalProperties": False}, {"type": "array", "items": {"type": "integer"}, "maxItems": 3}]},
    "one of": {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"], "additionalProperties": False}, {"type": "object", "properties": {"kind": {"const": "b"}, "n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["kind", "n"], "additionalProperties": False}]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": STRING}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}], "maxProperties": 2},
    "references": {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 99}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required": ["v", "next"], "additionalProperties": False}}},
    "patterns": {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": {"type": "integer", "minimum": 0, "maximum": 9}}, "additionalProperties": False, "maxProperties": 2},
    "keys": {"type": "object", "properties": {"a\"b": {"const": 1}, "\u00e9\n": {"type": "boolean"}, "": {"type": "null"}}, "required": ["a\"b", "\u00e9\n", ""], "additionalProperties": False},
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}, "c": {"type": "boolean"}}, "additionalProperties": False, "minProperties": 1},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_whole_answer_is_valid(client, model, name):
    """At temperature 1; one that was cut by its length is the beginning of one."""
    schema = SCHEMAS[name]
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    asked = dict(model=model, messages=ASK, response_format=format, max_tokens=200, temperature=1)
    whole = 0
    for seed in range(4):
        for choice in client.chat.completions.create(**asked, seed=seed, n=4).choices:
            if choice.finish_reason == "stop":
                whole += 1
                jsonschema.validate(json.loads(choice.message.content), schema)
    assert whole > 8, f"{whole} of 16 answers came to their end"


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class House(pydantic.BaseModel):
    number: int = pydantic.Field(ge=1, le=500)
    color: Color
    owner: Optional[str] = pydantic.Field(max_length=10)


class Village(pydantic.BaseModel):
    kind: Literal["village"]
    houses: list[House] = pydantic.Field(min_length=1, max_length=2)
    center: Union[House, bool]


def test_parse(client, model):
    for seed in range(4):
        asked = dict(model=model, messages=ASK, response_format=Village, max_tokens=400, seed=seed, temperature=1)
        message = client.chat.completions.parse(**asked).choices[0].message
        assert isinstance(message.parsed, Village)
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == message.content
        assert final.choices[0].message.parsed == message.parsed


def test_json_object(client, model):
    asked = dict(model=model, messages=ASK, response_format={"type": "json_object"}, max_tokens=300, temperature=1, n=8)
    for choice in client.chat.completions.create(**asked).choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_a_schema_that_cannot_be_honoured(client, model):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=ASK, response_format=format)
    assert refused.value.param == "response_format.json_schema.schema"
    assert "#/properties/a" in refused.value.message and "uniqueItems" in refused.value.message


def test_choice(client, model):
    asked = dict(model=model, prompt="The color is", max_tokens=20, n=4, temperature=1)
    completion = client.completions.create(**asked, extra_body={"structured_outputs": {"choice": ["red", "sky blue"]}})
    assert {choice.text for choice in completion.choices} <= {"red", "sky blue"}
