"""Makes server/src/hub/fixture/datasets.json: which files `datasets` takes for the rows of each split, of folders as repositories
on the hub have them. Each file has one row, its own name. Run by scripts/fixtures."""

import json
import pathlib
import tempfile

import datasets

FIXTURE = pathlib.Path(__file__).parents[2] / "server/src/hub/fixture/datasets.json"


def readme(*configs: str) -> str:
    return "---\nlicense: mit\nconfigs:\n" + "".join(configs) + "---\n# A data set\n"


EN_DE = readme(
    "- config_name: en\n  default: true\n  data_files:\n  - split: train\n    path: en/train-*\n  - split: test\n    path:\n    - en/t1.csv\n    - en/t2.csv\n",
    "- config_name: de\n  data_files: \"de/**/*.csv\"\n",
    "- config_name: fr\n  data_dir: fr\n",
)
EN_DE_FILES = "en/train-1.csv en/train-2.csv en/t1.csv en/t2.csv de/x/a.csv de/b.csv fr/train.csv fr/dev.csv other.csv"
CASES = [
    ("train.jsonl", None, None),
    ("train.jsonl test.jsonl valid.jsonl", None, None),
    ("train.csv eval.csv notes.md", None, None),
    ("data.jsonl", None, None),
    ("a.jsonl b.jsonl sub/c.jsonl", None, None),
    ("data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl data/test-00000-of-00001.jsonl", None, None),
    ("data/extra-00000-of-00001-abcdef.jsonl data/train-00000-of-00001-abcdef.jsonl", None, None),
    ("train/one.csv train/two.csv test/one.csv", None, None),
    ("data/training_1.jsonl data/testing_1.jsonl dev-set/x.jsonl", None, None),
    ("my_train_file.csv my_validation_file.csv", None, None),
    ("strained.csv contest.csv", None, None),
    ("train.jsonl .hidden/train.jsonl __pycache__/train.jsonl dataset_infos.json", None, None),
    (EN_DE_FILES, EN_DE, None),
    (EN_DE_FILES, EN_DE, "de"),
    (EN_DE_FILES, EN_DE, "fr"),
    ("a.csv b.csv", readme("- config_name: default\n  data_files: \"[ab].csv\"\n"), None),
    ("x/a.csv x/y/b.csv z.csv", readme("- config_name: only\n  data_files:\n  - split: train\n    path: \"x/**\"\n  - split: rest\n    path: \"?.csv\"\n"), None),
]


def written(file: str) -> str:
    if file.endswith((".csv", ".tsv")):
        return f"text\n{file}\n"
    if file.endswith("dataset_infos.json"):
        return "{}"
    return json.dumps({"text": file}) + "\n"


def main() -> None:
    repositories = []
    for files, about, config in CASES:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            for file in files.split():
                path = pathlib.Path(folder) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(written(file))
            if about:
                (pathlib.Path(folder) / "README.md").write_text(about)
            loaded = datasets.load_dataset(folder, name=config, cache_dir=cache)
            splits = {str(split): list(rows["text"]) for split, rows in loaded.items()}
        repositories.append({"files": files.split(), "readme": about, "config": config, "splits": splits})
        print(config, splits, flush=True)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(repositories, indent=1) + "\n")


if __name__ == "__main__":
    main()
