#!/usr/bin/env python3
"""Answers by real schemas, judged by jsonschema: Kubernetes' own kinds, as the package kubernetes-validate ships them.

usage: structured.py URL [COUNT]      (of a running server; wants openai, jsonschema and kubernetes-validate)

At temperature 1 each schema gets one answer, which is valid, cut by its length, or refused with a reason. Then the time
between tokens and to the first one, bound and free in turn.
"""
import json
import pathlib
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import kubernetes_validate
import openai

URL, COUNT = sys.argv[1], int((sys.argv[2:] or ["200"])[0])
CLIENT = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0, timeout=600)
MODEL = CLIENT.models.list().data[0].id
FOLDER = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.31.0-local"
DEFINITIONS = json.loads((FOLDER / "_definitions.json").read_text())["$defs"]
PREFIX = "/api/_definitions.json#/$defs/"


def whole(schema):
    """The schema with the definitions it refers to inside."""
    needed, text = {}, json.dumps(schema)
    left = [text]
    while left:
        for part in left.pop().split(PREFIX)[1:]:
            name = part.split('"')[0]
            if name not in needed:
                needed[name] = DEFINITIONS[name]
                left.append(json.dumps(needed[name]).replace('"#/$defs/', '"' + PREFIX))
    schema = json.loads(text.replace(PREFIX, "#/$defs/"))
    needed = json.loads(json.dumps(needed).replace(PREFIX, "#/$defs/"))
    return {**schema, "$defs": needed} if needed else schema


def ask(number, schema):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    say = [{"role": "user", "content": f"Write a short example of: {schema.get('description', 'this')}"[:400]}]
    try:
        asked = dict(model=MODEL, messages=say, max_tokens=160, temperature=1, seed=number, response_format=form)
        choice = CLIENT.chat.completions.create(**asked).choices[0]
    except openai.BadRequestError as refused:
        return "refused", str(refused.message).split("cannot be honoured: ")[-1][:120]
    if choice.finish_reason == "length":
        return "cut", ""
    try:
        jsonschema.validate(json.loads(choice.message.content), schema)
    except Exception as error:  # whatever it is, the answer was not valid
        return "invalid", f"{choice.message.content!r}: {error}"[:300]
    return "valid", ""


def timed(form, fresh):
    """Milliseconds between tokens (median), and to the first one."""
    say = [{"role": "user", "content": "Describe a baker of a small village, at length."}]
    asked = dict(model=MODEL, messages=say, max_tokens=64, temperature=1, seed=1, stream=True)
    if form:
        property = f"name_{fresh}"
        schema = {"type": "object", "properties": {property: {"type": "string", "minLength": 900}}, "required": [property]}
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    began, times = time.perf_counter(), []
    for event in CLIENT.chat.completions.create(**asked):
        if event.choices and event.choices[0].delta.content:
            times.append(time.perf_counter())
    between = [1e3 * (b - a) for a, b in zip(times, times[1:])]
    return statistics.median(between), 1e3 * (times[0] - began)


def main():
    files = sorted(file for file in FOLDER.glob("*.json") if file.name not in ("_definitions.json", "all.json"))
    schemas = [whole(json.loads(file.read_text())) for file in random.Random(7).sample(files, COUNT)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(COUNT), schemas))
    for kind in ("valid", "cut", "refused", "invalid"):
        print(f"{kind} {sum(result == kind for result, _ in results)} of {COUNT}")
    for reason in sorted({f"{kind}: {why}" for kind, why in results if why}):
        print(" ", reason)
    timed(False, 0), timed(True, 0)
    pairs = [(timed(False, 0), timed(True, 1000 + i), timed(True, 0)) for i in range(7)]
    between = [bound[0] / free[0] for free, _, bound in pairs]
    print(f"time between tokens, bound / free: median {statistics.median(between):.3f} of {[round(x, 2) for x in between]}")
    for name, which in (("free", 0), ("bound, compiled for it", 1), ("bound, known", 2)):
        print(f"first token, {name}: median {statistics.median(pair[which][1] for pair in pairs):.0f} ms")


if __name__ == "__main__":
    main()
