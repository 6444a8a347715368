"""lm-evaluation-harness against a server: the same tasks by its `local-completions` model (log-likelihoods through
/v1/completions with echo and logprobs) and by its `hf` model on the same folder, in float32. Both tasks are made here, of facts
and of this project's licence, so nothing is downloaded.

    pip install "lm-eval[api]" torch transformers
    tandem serve FOLDER --dtype float32 --port 8000
    python benches/lm_eval/run.py FOLDER http://127.0.0.1:8000

Ends with an error where a metric, or an answer's log-likelihood, differs by more than 1e-3. (A text's is a sum over up to two
thousand tokens, of which float32 leaves fewer digits: it is shown.)
"""

import json
import os
import pathlib
import sys
import tempfile
import urllib.request

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
HERE = pathlib.Path(__file__).resolve().parent
LIMIT = 1e-3
# Of a long text, in tokens. Models behind an API cut it two shorter than they are told (lm_eval/models/api_models.py).
WINDOW = 1024

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Austria": "Vienna", "Norway": "Oslo", "Portugal": "Lisbon", "Russia": "Moscow", "China": "Beijing",
}
COLOURS = {"snow": "white", "coal": "black", "grass": "green", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


def rows():
    """Questions with four answers each, of which `label` is right."""
    for kind, table in (("What is the capital of {}?", CAPITALS), ("What colour is {}?", COLOURS)):
        answers = list(table.values())
        for number, (subject, answer) in enumerate(table.items()):
            others = [other for other in answers if other != answer]
            choices = [others[(number + i) % len(others)] for i in range(3)]
            choices.insert(number % 4, answer)
            yield {"question": kind.format(subject), "choices": choices, "label": number % 4}


def texts():
    """Paragraphs of the licence, and all of it: longer than a context of lm-eval's windows may be."""
    licence = (HERE.parents[1] / "LICENSE").read_text()
    paragraphs = [" ".join(part.split()) for part in licence.split("\n\n") if len(part.split()) > 20]
    return [{"text": text} for text in [*paragraphs[:12], " ".join(paragraphs)]]


def evaluate(model, arguments, folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        model=model, model_args=arguments, tasks=["tandem_facts", "tandem_texts"], task_manager=manager, log_samples=True,
        bootstrap_iters=0,
    )


def likelihoods(results, task):
    """Of each request, in the order of documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    def numbers(response):
        return [response] if isinstance(response, (int, float)) else [response[0]]
    return [x for sample in samples for response in sample["filtered_resps"] for x in numbers(response)]


def main():
    model, server = sys.argv[1:]
    with urllib.request.urlopen(server + "/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for file, lines in (("facts.jsonl", rows()), ("texts.jsonl", texts())):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file in ("facts", "texts"):
            text = (HERE / f"{file}.yaml").read_text()
            (folder / f"{file}.yaml").write_text(text.replace(f"{file}.jsonl", str(folder / f"{file}.jsonl")))
        served = evaluate(
            "local-completions",
            f"model={name},base_url={server}/v1/completions,tokenizer={model},max_length={WINDOW + 2},num_concurrent=4", folder,
        )
        expected = evaluate("hf", f"pretrained={model},dtype=float32,device=cpu,max_length={WINDOW}", folder)
    worst = 0.0
    for task in ("tandem_facts", "tandem_texts"):
        ours, theirs = likelihoods(served, task), likelihoods(expected, task)
        assert len(ours) == len(theirs) > 0
        far = max(abs(a - b) for a, b in zip(ours, theirs))
        print(f"{task}: {len(ours)} log-likelihoods, at most {far:.1e} apart")
        if task == "tandem_facts":
            worst = max(worst, far)
        for metric, value in served["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                hf = expected["results"][task][metric]
                worst = max(worst, abs(value - hf))
                print(f"  {metric}: {value:.6f} served, {hf:.6f} by hf")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
