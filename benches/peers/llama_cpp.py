"""llama.cpp as a peer for inference, by its own benchmark programs.

  llama_cpp.py BIN_FOLDER FILE.gguf     BIN_FOLDER holds llama-bench and llama-batched-bench

Prints one JSON line: prefill_512, decode_1, decode_8, decode_16 (256-token prompts), the keys of `target/release/engine`.
"""

import json
import subprocess
import sys

THREADS = "2"


def main() -> None:
    folder, model = sys.argv[1:3]
    bench = run([f"{folder}/llama-bench", "-m", model, "-t", THREADS, "-p", "512", "-n", "0", "-r", "3", "-o", "json"])
    result = {"prefill_512": max(json.loads(bench)[0]["samples_ts"])}
    batched = run([f"{folder}/llama-batched-bench", "-m", model, "-t", THREADS, "-c", "8192", "-npp", "256", "-ntg", "64",
                   "-npl", "1,8,16", "--output-format", "jsonl"])
    for line in batched.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            result[f"decode_{row['pl']}"] = row["speed_tg"]
    print(json.dumps(result))


def run(command: list) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
