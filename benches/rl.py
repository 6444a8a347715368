#!/usr/bin/env python3
"""Reinforcement learning by a rule: the same loop by Tandem, by peft in one process, and by two processes that pass files.

usage: rl.py MODEL [--turns N] [--steps N] [--threads N] [--sdk-python PYTHON] [--peer-python PYTHON] [--ways tandem,peft,files]
(wants the release binary; the first PYTHON has tinker and transformers, the other torch, transformers and peft)

A step: a group of samples of each prompt, their rewards (the share of tokens that hold the letter e) less the group's mean as
advantages, one step of AdamW along importance-weighted policy gradients. Prompts, sizes, rank, rate and numbers (a base in
bfloat16, adapters and moments in float32) are the same for all. Each turn runs every way once, so that who else uses the
machine meets them alike. Prints a table: rewards of the first and the last steps; medians over all steps with the best one;
tokens for each second of a core, which says most where others use the machine.
"""
import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUESTIONS = ["Tell me about the sea.", "What is a garden for?", "Describe a winter day.", "How does a clock work?"]
GROUP, TOKENS, RANK, RATE = 8, 24, 8, 2e-3


class Loop:
    """What all ways have in common. A way has `publish`, `sample(prompts)` -> [(tokens, logprobs)] and `learn`."""

    def __init__(self, model):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
        self.prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.holds_e = [b"e" in self.tokenizer.decode([i]).lower().encode() for i in range(len(self.tokenizer))]

    def reward(self, tokens):
        return sum(self.holds_e[token] for token in tokens) / len(tokens)

    def run(self, way, steps):
        """One record a step: seconds of its parts, reward, how far sampler and trainer are apart."""
        for _ in range(steps):
            times, cores = [time.monotonic()], [way.cores()]

            def done():
                times.append(time.monotonic())
                cores.append(way.cores())

            publication = way.publish()
            done()
            groups = way.sample(self.prompts)
            done()
            rows, rewards = [], []
            for prompt, group in zip(self.prompts, groups):
                scores = [self.reward(tokens) for tokens, _ in group]
                rewards += scores
                mean = statistics.mean(scores)
                rows += [(prompt, *sample, score - mean) for sample, score in zip(group, scores)]
            done()
            trained = way.learn(rows)
            done()
            apart = [abs(p - q) for (_, _, sampled, _), found in zip(rows, trained) for p, q in zip(found, sampled)]
            publish, sample, score, learn = (after - before for before, after in zip(times, times[1:]))
            _, sample_cores, _, learn_cores = (after - before for before, after in zip(cores, cores[1:]))
            yield {
                "reward": statistics.mean(rewards), "publish": publish, "sample": sample, "score": score, "learn": learn,
                "publication": publication, "sample_cores": sample_cores, "learn_cores": learn_cores,
                "sampled": sum(len(row[1]) for row in rows),
                "trained": sum(len(row[0]) + len(row[1]) for row in rows),
                "apart": statistics.mean(apart), "most_apart": max(apart),
            }


class Tandem:
    """The unmodified SDK against the server."""

    def __init__(self, model, threads):
        import tinker

        self.tinker = tinker
        os.environ |= {"TINKER_API_KEY": "tml-none", "TINKER_TELEMETRY": "0"}
        command = [ROOT / "target/release/tandem", "serve", model, "--port", "0", "--threads", str(threads), "--data-dir", tempfile.mkdtemp()]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        service = tinker.ServiceClient(base_url=self.server.stdout.readline().split()[-1])
        base = next(model.model_name for model in service.get_server_capabilities().supported_models)
        self.model = service.create_lora_training_client(base, rank=RANK, seed=1, train_unembed=False).result()
        self.seed = 0

    def publish(self):
        began = time.monotonic()
        self.sampler = self.model.save_weights_and_get_sampling_client().result()
        self.ask([1], 1, 1).result()
        return time.monotonic() - began

    def ask(self, prompt, n, tokens):
        self.seed += n
        params = self.tinker.SamplingParams(max_tokens=tokens, temperature=1.0, seed=self.seed, stop=[])
        return self.sampler.sample(self.tinker.ModelInput.from_ints(prompt), n, params)

    def sample(self, prompts):
        asked = [self.ask(prompt, GROUP, TOKENS) for prompt in prompts]
        return [[(s.tokens, s.logprobs) for s in one.result().sequences] for one in asked]

    def learn(self, rows):
        data = []
        for prompt, tokens, logprobs, advantage in rows:
            before = len(prompt) - 1
            inputs = {
                "target_tokens": [*prompt[1:], *tokens],
                "logprobs": [0.0] * before + list(logprobs),
                "advantages": [0.0] * before + [advantage] * len(tokens),
            }
            text = self.tinker.ModelInput.from_ints([*prompt, *tokens[:-1]])
            data.append(self.tinker.Datum(model_input=text, loss_fn_inputs=inputs))
        found = self.model.forward_backward(data, "importance_sampling")
        self.model.optim_step(self.tinker.AdamParams(learning_rate=RATE)).result()
        found = found.result().loss_fn_outputs
        return [one["logprobs"].data[len(row[0]) - 1 :] for one, row in zip(found, rows)]

    def cores(self):
        return core_seconds(self.server.pid) + core_seconds("self")

    def memory(self):
        return peak(self.server.pid)

    def end(self):
        self.server.send_signal(signal.SIGTERM)
        self.server.wait()


class Peft:
    """peft and transformers' generate, in this process."""

    def __init__(self, model, threads):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(1)
        self.torch = torch
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
        lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")
        self.model = get_peft_model(base, lora)
        # Texts are as long as they are asked to be, and nothing but the temperature shapes what is drawn.
        self.drawn = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
        self.model.generation_config.eos_token_id = None
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
        )

    def publish(self):
        return 0.0

    def padded(self, texts):
        """On the left: tokens, and which are."""
        longest = max(map(len, texts))
        ids = self.torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        mask = self.torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        return ids, mask

    def sample(self, prompts):
        ids, mask = self.padded([prompt for prompt in prompts for _ in range(GROUP)])
        self.model.eval()
        with self.torch.no_grad():
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **self.drawn
            )
        tokens = made.sequences[:, ids.shape[1] :]
        logits = self.torch.stack(made.logits, 1).float().log_softmax(-1)
        logprobs = logits.gather(-1, tokens[..., None])[..., 0]
        samples = list(zip(tokens.tolist(), logprobs.tolist()))
        return [samples[i : i + GROUP] for i in range(0, len(samples), GROUP)]

    def learn(self, rows):
        torch = self.torch
        ids, mask = self.padded([[*prompt, *tokens] for prompt, tokens, _, _ in rows])
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            places = (mask.cumsum(1) - 1).clamp(min=0)
            found = self.model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=TOKENS + 1).logits
        logits = found[:, :-1].float().log_softmax(-1)
        p = logits.gather(-1, ids[:, -TOKENS:, None])[..., 0]
        q = torch.tensor([logprobs for _, _, logprobs, _ in rows])
        advantages = torch.tensor([[advantage] for _, _, _, advantage in rows])
        (-(torch.exp(p - q) * advantages).sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return p.detach().tolist()

    def cores(self):
        return core_seconds("self")

    def memory(self):
        return peak("self")

    def end(self):
        pass


class Files(Peft):
    """A trainer here, a sampler in a process of its own, adapter folders from one to the other."""

    def __init__(self, model, threads):
        super().__init__(model, threads)
        self.folder = tempfile.mkdtemp()
        command = [sys.executable, __file__, model, "--way", "sampler", "--threads", str(threads)]
        self.other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.tell("ready")

    def tell(self, *what):
        self.other.stdin.write(json.dumps(what) + "\n")
        self.other.stdin.flush()
        return json.loads(self.other.stdout.readline())

    def publish(self):
        began = time.monotonic()
        self.model.save_pretrained(self.folder)
        self.tell("load", self.folder)
        return time.monotonic() - began

    def sample(self, prompts):
        return self.tell("sample", prompts)

    def cores(self):
        return super().cores() + core_seconds(self.other.pid)

    def memory(self):
        return super().memory() + peak(self.other.pid)

    def end(self):
        self.other.stdin.close()
        self.other.wait()


def sampler(model, threads):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    peft = Peft(model, threads)
    for line in sys.stdin:
        answer = None
        match json.loads(line):
            case ["load", folder]:
                set_peft_model_state_dict(peft.model, load_file(f"{folder}/adapter_model.safetensors"))
            case ["sample", prompts]:
                answer = peft.sample(prompts)
        print(json.dumps(answer), flush=True)


def core_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


WAYS = {"tandem": Tandem, "peft": Peft, "files": Files}


def one_way(arguments):
    loop, way = Loop(arguments.model), WAYS[arguments.way](arguments.model, arguments.threads)
    for record in loop.run(way, arguments.steps):
        print(json.dumps(record), flush=True)
    print(json.dumps({"memory": way.memory()}))
    way.end()


def table(name, runs):
    # The first step of a process warms it up.
    steps = [step for run in runs for step in run[1:-1]]
    whole = lambda step: step["publish"] + step["sample"] + step["score"] + step["learn"]

    def share(part):
        return f"{statistics.median(part(step) / whole(step) for step in steps):.1%}"

    def median_and(best, value, form):
        values = [value(step) for step in steps]
        return f"{statistics.median(values):{form}} ({best(values):{form}})"

    rewards = [statistics.mean(step["reward"] for run in runs for step in part(run[:-1])) for part in (lambda r: r[:2], lambda r: r[-3:])]
    # Of a process that samples and one that learns each waits for the other.
    idle = {"files": [lambda s: whole(s) - s["sample"], lambda s: whole(s) - s["learn"]]}
    row = [
        name,
        ", ".join(f"{reward:.2f}" for reward in rewards),
        median_and(min, whole, ".1f"),
        median_and(max, lambda s: s["sampled"] / s["sample"], ".0f"),
        median_and(max, lambda s: s["trained"] / s["learn"], ".0f"),
        median_and(max, lambda s: s["sampled"] / s["sample_cores"], ".0f"),
        median_and(max, lambda s: s["trained"] / s["learn_cores"], ".0f"),
        median_and(min, lambda s: 1e3 * s["publication"], ".0f"),
        " and ".join(map(share, idle.get(name, [lambda s: s["publish"] + s["score"]]))),
        f"{statistics.median(s['apart'] for s in steps):.0e}, {max(s['most_apart'] for s in steps):.0e}",
        f"{max(run[-1]['memory'] for run in runs):.0f}",
    ]
    print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sdk-python", default=sys.executable)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--ways", default="tandem,peft,files")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way == "sampler":
        return sampler(arguments.model, arguments.threads)
    if arguments.way:
        return one_way(arguments)
    runs = {way: [] for way in arguments.ways.split(",")}
    for _ in range(arguments.turns):
        for way in runs:
            python = arguments.sdk_python if way == "tandem" else arguments.peer_python
            command = [python, __file__, arguments.model, "--way", way, "--steps", str(arguments.steps)]
            command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[way].append([json.loads(line) for line in done.stdout.splitlines()])
            print(way, [round(step["reward"], 2) for step in runs[way][-1][:-1]], file=sys.stderr)
    head = ["way", "reward before, after", "a step, s", "sampled, tokens/s", "trained", "sampled for a core's second", "trained", "published in, ms", "waiting"]
    head += ["log-probabilities apart: mean, most", "peak memory, MB"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for way, found in runs.items():
        table(way, found)


if __name__ == "__main__":
    main()
