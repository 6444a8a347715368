"""One greedy key beside a modest one: `python benches/fairness.py URL MODEL GREEDY_KEY MODEST_KEY`, against a server that was
started with both (`--api-key GREEDY_KEY --api-key MODEST_KEY`).

The modest key asks one thing after another, first alone, then while the greedy key keeps many requests under way. Said are the
modest key's times to the first token and between tokens in both, and how the generated tokens are shared.
"""

import argparse
import statistics
import threading
import time

import openai

WORDS = "river stone window garden letter market evening bridge silver morning".split()


def prompt(number, words):
    """No two alike, so that no prefix is found in the cache."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] + str(number % 97) for i in range(words))


class Asker:
    """One key; each of its connections asks again as soon as it was answered."""

    def __init__(self, url, key, model, words, tokens):
        self.client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
        self.body = {"model": model, "max_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
        self.words, self.first, self.gaps, self.generated, self.refused = words, [], [], 0, 0
        self.number = 0

    def ask(self):
        self.number += 1
        began = last = time.perf_counter()
        try:
            stream = self.client.completions.create(prompt=prompt(hash((id(self), self.number)), self.words), stream=True, **self.body)
            for chunk in stream:
                now = time.perf_counter()
                if chunk.choices and chunk.choices[0].text:
                    (self.first if last == began else self.gaps).append(now - last)
                    last = now
                    self.generated += 1
        except openai.RateLimitError:
            self.refused += 1
            time.sleep(0.2)

    def until(self, stop):
        while not stop.is_set():
            self.ask()

    def said(self):
        def p(times, percent):
            return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))] * 1000

        return [p(self.first, 50), p(self.first, 99), p(self.gaps, 50), p(self.gaps, 99)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "model", "greedy_key", "modest_key"):
        parser.add_argument(name)
    parser.add_argument("--connections", type=int, default=32, help="of the greedy key")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()

    def asker(key):
        return Asker(options.url, key, options.model, options.words, options.tokens)

    def measured(beside):
        modest, stop = asker(options.modest_key), threading.Event()
        greedy = asker(options.greedy_key)
        threads = [threading.Thread(target=greedy.until, args=(stop,)) for _ in range(options.connections if beside else 0)]
        for thread in threads:
            thread.start()
        time.sleep(3 if beside else 0)
        before, began = greedy.generated, time.perf_counter()
        modest.ask()  # warms up
        modest.first.clear(), modest.gaps.clear()
        modest.generated = 0
        while time.perf_counter() - began < options.seconds:
            modest.ask()
        seconds = time.perf_counter() - began
        shares = [modest.generated / seconds, (greedy.generated - before) / seconds]
        stop.set()
        for thread in threads:
            thread.join()
        return modest.said(), shares, modest.refused, greedy.refused

    (alone, (rate, _), _, _), (beside, shares, refused, greedily) = measured(False), measured(True)
    print("| the modest key | TTFT p50, p99 | between tokens p50, p99 | tokens/s |\n|---|---|---|---|")
    for name, times, tokens in (("alone", alone, rate), ("beside the greedy one", beside, shares[0])):
        print(f"| {name} | {times[0]:.0f}, {times[1]:.0f} ms | {times[2]:.1f}, {times[3]:.1f} ms | {tokens:.1f} |")
    ratios = [now / then for now, then in zip(beside, alone)]
    print(f"ratios: TTFT x {ratios[0]:.2f}, {ratios[1]:.2f}; between tokens x {ratios[2]:.2f}, {ratios[3]:.2f}")
    each = shares[1] / options.connections
    print(
        f"the greedy key: {options.connections} connections, {shares[1]:.1f} tokens/s, {each:.2f} for each of them; the modest key's "
        f"one has {shares[0] / each:.1f} times as much; refused: {refused} and {greedily}"
    )
    assert refused == 0 and statistics.fmean(beside) > 0


if __name__ == "__main__":
    main()
