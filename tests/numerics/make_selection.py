"""Makes backend/core/src/job/selection.json: when runs of transformers stop early, which of their models is the best, and which
checkpoints stay.

Each run is a list of validations. They go through EarlyStoppingCallback.on_evaluate and Trainer._determine_best_metric in the order in
which the Trainer calls them; checkpoints are folders that rotate_checkpoints goes over. No model is trained, and nothing of Tandem runs.
"""

import json
import pathlib
import random
import tempfile
import types

import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

TARGET = pathlib.Path(__file__).parents[2] / "backend/core/src/job/selection.json"


def run(folder, greater_is_better, patience, threshold, values):
    args = TrainingArguments(
        output_dir=folder, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=greater_is_better, use_cpu=True, report_to="none",
    )
    state, control = TrainerState(), TrainerControl()
    callback = EarlyStoppingCallback(patience, threshold)
    trainer = types.SimpleNamespace(args=args, state=state)
    stopped_at = None
    for number, value in enumerate(values, 1):
        state.global_step = 10 * number
        metrics = {"eval_loss": value}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            stopped_at = state.global_step
            break
    return {
        "greater_is_better": greater_is_better, "patience": patience, "threshold": threshold, "values": values,
        "stopped_at": stopped_at, "best_step": state.best_global_step,
    }


def rotation(steps, best, limit):
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            (pathlib.Path(folder) / f"checkpoint-{step}").mkdir()
        rotate_checkpoints(folder, limit, best and f"{folder}/checkpoint-{best}")
        left = sorted(int(path.name.split("-")[1]) for path in pathlib.Path(folder).iterdir())
    return {"steps": steps, "best": best, "limit": limit, "left": left}


def main():
    draw = random.Random(7)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for greater_is_better in (False, True):
            for threshold in (0.0, 0.05):
                for patience in (1, 2, 3):
                    for _ in range(12):
                        # Steps of a sixteenth, so that equal values and differences of the threshold itself occur.
                        values = [draw.randrange(16) / 16 for _ in range(draw.randrange(2, 9))]
                        runs.append(run(folder, greater_is_better, patience, threshold, values))
                    falling = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.8, 0.8]
                    runs.append(run(folder, greater_is_better, patience, threshold, falling))
    steps = [10, 20, 30, 40, 50]
    rotations = [rotation(steps[:n], best, limit) for n in (1, 3, 5) for best in (None, *steps[:n]) for limit in (1, 2, 3, 5)]
    made = {"transformers": transformers.__version__, "runs": runs, "rotations": rotations}
    text = json.dumps(made).replace(', {"greater', ',\n{"greater').replace(', {"steps"', ',\n{"steps"')
    TARGET.write_text(text + "\n")


main()
