"""Put the CPU libtorch of the PyTorch wheel into third_party/ (called by scripts/setup).

Only what a C++ or Rust program needs is kept: headers, the CPU libraries and the licences.
Standard library and pip only.
"""

import argparse
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

TORCH = "2.11.0"
# The default wheel's CPU library is linked against these two (0.7 MB and 10 MB); their versions are the ones it names.
CUDA_RUNTIME = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
CUDA_LIBRARIES = ("libcudart.so.13", "libcupti.so.13")


def download(requirement: str, folder: pathlib.Path, index_url: str | None) -> pathlib.Path:
    """Fetch one wheel. The tags are fixed, so that any Python 3 with pip can fetch the same file."""
    before = set(folder.glob("*.whl"))
    machine = platform.machine()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", "311"]
    for abi in ("cp311", "abi3", "none"):
        command += ["--abi", abi]
    for glibc in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_25", "manylinux2014", "manylinux_2_18", "manylinux_2_17", "linux"):
        command += ["--platform", f"{glibc}_{machine}"]
    if index_url:
        command += ["--index-url", index_url]
    command += ["--dest", str(folder), requirement]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"pip could not fetch {requirement}; see its message above (--index-url takes another index)")
    return (set(folder.glob("*.whl")) - before).pop()


def place(name: str) -> str | None:
    """Where a file of the torch wheel goes, or None when it is not needed."""
    if name.startswith("torch/include/"):
        return name.removeprefix("torch/")
    if name.startswith("torch/lib/"):
        library = name.removeprefix("torch/lib/")
        if library.startswith(("libtorch_cpu.so", "libc10.so", "libgomp", "libarm", "libopenblas", "libgfortran")):
            return "lib/" + library
    if place_hipify(name):
        return place_hipify(name)
    if ".dist-info/" in name:
        inside = name.split(".dist-info/", 1)[1]
        if inside.startswith("licenses/") or inside.split("/")[-1].upper().startswith(("LICENSE", "NOTICE")):
            return "licenses/torch/" + inside.removeprefix("licenses/")
    return None


def place_hipify(name: str) -> str | None:
    """torch's own translator from CUDA to HIP, which scripts/check-gpu-headers uses."""
    if name.startswith("torch/utils/hipify/") and name.endswith(".py"):
        return name.removeprefix("torch/utils/")
    return None


def extract(wheel: pathlib.Path, target: pathlib.Path, where) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = None if entry.is_dir() else where(entry.filename)
            if path is None:
                continue
            out = target / path
            out.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(out, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def place_cuda(wheel: pathlib.Path):
    package = wheel.name.split("-")[0]

    def where(name: str) -> str | None:
        file = name.split("/")[-1]
        if file in CUDA_LIBRARIES:
            return "lib/" + file
        if ".dist-info/" in name and "licen" in file.lower():
            return f"licenses/{package}/{file}"
        return None

    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=pathlib.Path, help="folder to make, e.g. third_party/libtorch-2.11.0-cpu")
    parser.add_argument("--index-url", help="package index to take the torch wheel from")
    parser.add_argument("--cc", default="cc", help="C compiler for the one-line stub library")
    arguments = parser.parse_args()

    target: pathlib.Path = arguments.target
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    # Everything is made next to the target and renamed at the end: an interrupted run leaves nothing half-made.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".libtorch-") as scratch:
        work = pathlib.Path(scratch)
        fresh = work / "libtorch"
        wheel = download(f"torch=={TORCH}", work, arguments.index_url)
        with zipfile.ZipFile(wheel) as archive:
            has_cuda = "torch/lib/libtorch_cuda.so" in archive.namelist()
        print(f"unpacking {wheel.name}", flush=True)
        extract(wheel, fresh, place)
        wheel.unlink()
        if has_cuda:
            for requirement in CUDA_RUNTIME:
                wheel = download(requirement, work, arguments.index_url)
                extract(wheel, fresh, place_cuda(wheel))
                wheel.unlink()
        # The wheel's libtorch.so has no code of its own, but would ask for the CUDA libraries at start.
        stub = [arguments.cc, "-shared", "-fPIC", "-Wl,-soname,libtorch.so", "-o", str(fresh / "lib/libtorch.so")]
        subprocess.run(stub + ["-x", "c", "/dev/null"], check=True)
        (fresh / "build-version").write_text(f"{TORCH}+cpu\n")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"libtorch {TORCH} for the CPU: {size / 1e6:.0f} MB in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
