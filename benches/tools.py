"""Tool calls of a running server with a real model: `python benches/tools.py URL`. Fifty questions with tools beside them: is
every answer streamed the same as whole at temperature 0, is every call that must be valid by its schema, and how often does
the model call the right function by itself?"""

import json
import sys

import jsonschema
import openai


def function(name, description, required, **properties):
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
TOOLS = [
    function("get_weather", "The current weather of a city.", ["city"], city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    function("send_email", "Send an email.", ["to", "subject", "body"], to=TEXT, subject=TEXT, body=TEXT),
    function("convert_currency", "Convert an amount of money.", ["amount", "source", "target"], amount=NUMBER, source={"type": "string", "pattern": "^[A-Z]{3}$"}, target={"type": "string", "pattern": "^[A-Z]{3}$"}),
    function("set_timer", "Start a timer.", ["minutes"], minutes={"type": "integer", "minimum": 1, "maximum": 600}, label=TEXT),
    function("search_files", "Search files by words in them.", ["words"], words={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 5}, folder=TEXT),
    function("run_sql", "Run a read-only SQL query.", ["query"], query=TEXT, limit={"type": "integer", "minimum": 1, "maximum": 1000}),
    function("book_table", "Book a table in a restaurant.", ["restaurant", "people", "time"], restaurant=TEXT, people={"type": "integer", "minimum": 1, "maximum": 20}, time={"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}),
    function("turn_light", "Turn a light of the house on or off.", ["room", "on"], room={"enum": ["kitchen", "bedroom", "bathroom", "garden"]}, on={"type": "boolean"}),
]
CASES = [
    *[(f"What is the weather in {city}?", "get_weather") for city in ["Paris", "Tokyo", "New York", "Nairobi", "Bern", "São Paulo"]],
    *[(f"Send an email to {who} that says: {what}", "send_email") for who, what in [("ann@example.com", "I am late"), ("bob@example.com", "the report is ready"), ("c@example.org", "happy birthday"), ("dan@example.net", "call me"), ("eve@example.com", "the meeting is at 3"), ("team@example.com", "lunch is served")]],
    *[(f"How much are {n} {a} in {b}?", "convert_currency") for n, a, b in [(100, "USD", "EUR"), (25.5, "GBP", "JPY"), (1000, "CHF", "USD"), (7, "EUR", "SEK"), (300, "INR", "EUR"), (42, "CAD", "MXN")]],
    *[(f"Set a timer for {n} minutes", "set_timer") for n in [5, 10, 25, 90, 3, 45]],
    *[(f"Find the files that mention {words}", "search_files") for words in ["invoice and 2024", "kubernetes", "tax return", "mother's birthday", "gradient checkpointing", "lease agreement"]],
    *[(f"Query the database: {what}", "run_sql") for what in ["how many users are there?", "the names of all customers in Berlin", "total sales per month", "the ten newest orders", "which products are out of stock?", "average age of employees"]],
    *[(f"Book a table for {n} at {where} at {time}", "book_table") for n, where, time in [(2, "Luigi's", "19:30"), (4, "Chez Anne", "20:00"), (6, "Sakura", "18:15"), (3, "El Toro", "21:00"), (8, "The Crown", "12:30"), (5, "Bella Napoli", "19:00"), (2, "Noma", "18:45")]],
    *[(f"Turn {state} the light in the {room}", "turn_light") for state, room in [("on", "kitchen"), ("off", "bedroom"), ("on", "garden"), ("off", "bathroom"), ("on", "bedroom"), ("off", "kitchen"), ("on", "bathroom")]],
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def whole(client, **body):
    choice = client.chat.completions.create(**body).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content, calls, choice.finish_reason


def streamed(client, **body):
    content, calls, finish = None, [], None
    for chunk in client.chat.completions.create(**body, stream=True):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for part in choice.delta.tool_calls or []:
            if part.index == len(calls):
                calls.append((part.function.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = (name, arguments + part.function.arguments)
    return content, calls, finish


def is_valid(calls):
    try:
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        return bool(calls)
    except (ValueError, KeyError, jsonschema.ValidationError):
        return False


def main(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    count = dict.fromkeys(["equal", "auto called", "auto right", "auto valid", "required ended", "required valid", "required right", "required at 1 ended", "required at 1 valid", "named ended", "named valid"], 0)
    for question, right in CASES:
        body = dict(model=model, messages=[{"role": "user", "content": question}], tools=TOOLS, max_tokens=160, temperature=0)
        content, calls, finish = whole(client, **body)
        count["equal"] += (content, calls, finish) == streamed(client, **body)
        count["auto called"] += bool(calls)
        count["auto right"] += bool(calls) and calls[0][0] == right
        count["auto valid"] += is_valid(calls)
        named = {"type": "function", "function": {"name": right}}
        for label, more in [("required", {}), ("required at 1", {"temperature": 1, "seed": 1}), ("named", {"tool_choice": named})]:
            asked = body | {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300} | more
            _, calls, finish = whole(client, **asked)
            ended = finish != "length"
            count[f"{label} ended"] += ended
            count[f"{label} valid"] += ended and is_valid(calls)
            if label == "required":
                count["required right"] += bool(calls) and calls[0][0] == right
        print(".", end="", flush=True)
    print(f"\n{model}, {len(CASES)} cases")
    for name, n in count.items():
        print(f"{name:<22} {n}")
    assert count["equal"] == len(CASES), "a stream differs from the whole"
    assert all(count[f"{label} valid"] == count[f"{label} ended"] for label in ["required", "required at 1", "named"])


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
