#!/usr/bin/env python3
"""Prompt lookup beside none: the same answers, and how much sooner.

usage: speculation.py PLAIN_URL GUESSING_URL [COUNT [FIRST [AT_ONCE]]]
(two running servers of one instruct model, the second with --speculative-config; wants openai)

COUNT prompts (100), half of them to edit a text that they hold, half to write one; each in turn greedy and with a seed at
temperature 1. With FIRST (0) they begin at that one of each kind, so that a long run can be several short ones. Every answer
must be the same on both servers, to the last log-probability. Prints the ratio of their times, by kind, and of the guesses
those that were right. With AT_ONCE (1) so many prompts are asked together, and the times say little.
"""
import inspect
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai

URLS = sys.argv[1:3]
COUNT, FIRST, AT_ONCE = map(int, (sys.argv[3:] + ["100", "0", "1"][len(sys.argv[3:]) :])[:3])
CLIENTS = [openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600) for url in URLS]
MODEL = CLIENTS[0].models.list().data[0].id


def sources():
    """Functions of the standard library: texts that are on every machine."""
    import argparse, csv, difflib, heapq, json.decoder, shutil, statistics, textwrap, urllib.parse

    for module in [argparse, csv, difflib, heapq, json.decoder, shutil, statistics, textwrap, urllib.parse]:
        for _, one in sorted(inspect.getmembers(module, inspect.isfunction)):
            if one.__module__ == module.__name__ and 200 < len(source := inspect.getsource(one)) < 900:
                yield source


EDITS = ["Rename the first parameter to `value` and write the whole function again:", "Add a docstring, keep the rest:"]
TOPICS = ["a lighthouse", "bread", "the tide", "a lost key", "snow", "an orchard", "a clock", "trains", "honey", "a map"]
# Of an answer at most.
TOKENS = 120
FORMS = ["Write a short story about", "Explain to a child", "List five facts about", "Write a poem about", "Describe"]


def ask(client, prompt, number):
    greedy = number % 2 == 0
    began = time.monotonic()
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=TOKENS,
        temperature=0 if greedy else 1,
        seed=number,
        logprobs=True,
    )
    took = time.monotonic() - began
    tokens = [(one.token, one.logprob) for one in answer.choices[0].logprobs.content]
    return tokens, took


def counters(url):
    lines = urllib.request.urlopen(url + "/metrics").read().decode().splitlines()
    wanted = {"draft": "spec_decode_num_draft_tokens", "accepted": "spec_decode_num_accepted_tokens"}
    wanted |= {"steps": "tandem:engine_steps_total", "tokens": "generation_tokens_total"}
    value = lambda part: next(float(line.rsplit(" ", 1)[1]) for line in lines if part in line and line[0] != "#")
    return {name: value(part) for name, part in wanted.items()}


def main():
    code = [f"{EDITS[i % len(EDITS)]}\n\n{source}" for i, source in enumerate(sources())]
    free = [f"{form} {topic}." for topic in TOPICS for form in FORMS]
    different = 0
    for kind, prompts in [("edits", code), ("free", free)]:
        def both(numbered):
            number, prompt = numbered
            order = [0, 1] if number % 4 < 2 else [1, 0]
            answers = {which: ask(CLIENTS[which], prompt, number) for which in order}
            return answers[0], answers[1]

        before = counters(URLS[1])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(both, list(enumerate(prompts))[FIRST : FIRST + COUNT // 2]))
        ratios = [plain[1] / guessed[1] for plain, guessed in answers]
        ours = sum(len(guessed[0]) for _, guessed in answers)
        differ = sum(plain[0] != guessed[0] for plain, guessed in answers)
        different += differ
        after = counters(URLS[1])
        spent = {name: after[name] - before[name] for name in after}
        quarters = statistics.quantiles(ratios, n=4)
        print(
            f"{kind}: {len(ratios)} prompts, {ours} tokens; {spent['tokens'] / spent['steps']:.2f} tokens a step, "
            f"{spent['accepted']:.0f} of {spent['draft']:.0f} guesses right; time without / with: "
            f"median {quarters[1]:.2f}, quartiles {quarters[0]:.2f} to {quarters[2]:.2f}; {differ} answers differ"
        )
        print("each:", *(f"{ratio:.2f}" for ratio in ratios), flush=True)
    sys.exit(different > 0)


main()
