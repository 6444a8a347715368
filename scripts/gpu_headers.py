"""Compile the C++ shim against CUDA and ROCm headers (called by scripts/check-gpu-headers).

libtorch's headers are the same files for the CPU and for CUDA; for ROCm torch's own hipify rewrites them, here as in a
ROCm build of torch. Standard library, pip, g++; for ROCm apt-get.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import libtorch

LIBTORCH = pathlib.Path("third_party/libtorch")
CACHE = pathlib.Path("target/gpu-headers") / libtorch.TORCH
SHIM = pathlib.Path("kernels/csrc")

# The versions that torch 2.11.0 was built with.
CUDA_PACKAGES = [
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-nccl-cu13==2.28.9",
]
# ATen's headers mention these libraries' handles and results, which the shim never touches. Their packages weigh 800 MB:
# their names stand in.
CUDA_STAND_INS = {
    "cublas_v2.h": "struct cublasContext; typedef cublasContext* cublasHandle_t;\nenum cublasStatus_t : int;\n",
    "cublasLt.h": "struct cublasLtContext; typedef cublasLtContext* cublasLtHandle_t;\n",
    "cusparse.h": "struct cusparseContext; typedef cusparseContext* cusparseHandle_t;\nenum cusparseStatus_t : int;\n",
    "cusolver_common.h": "enum cusolverStatus_t : int;\n",
    "cusolverDn.h": "struct cusolverDnContext; typedef cusolverDnContext* cusolverDnHandle_t;\n",
}

DEBIAN = "sid"
ROCM_PACKAGES = [
    "libamdhip64-dev",
    "librccl-dev",
    "libhipblas-dev",
    "libhipblas-common-dev",
    "libhipblaslt-dev",
    "libhipsparse-dev",
    "libhipsolver-dev",
]
# What the NCCL process group's header includes, directly or not.
HIPIFIED = ["ATen/cuda/*", "c10/cuda/*", "torch/csrc/cuda/*", "torch/csrc/distributed/c10d/*"]


def once(folder: pathlib.Path, make) -> pathlib.Path:
    """Make a folder, whole or not at all, unless it is there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            fresh = pathlib.Path(scratch) / "fresh"
            fresh.mkdir()
            make(fresh)
            fresh.rename(folder)
    return folder


def make_cuda(folder: pathlib.Path) -> None:
    for requirement in CUDA_PACKAGES:
        wheel = libtorch.download(requirement, folder, None)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/include/" in name and not name.endswith("/"):
                    out = folder / name.split("/include/", 1)[1]
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_bytes(archive.read(name))
        wheel.unlink()


KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
HIP_NEEDS = f"needs apt-get and {KEYRING} (package debian-archive-keyring), or ROCM_PATH"


def can_have_hip() -> bool:
    apt = shutil.which("apt-get") and shutil.which("dpkg-deb") and os.path.exists(KEYRING)
    return bool(apt or os.environ.get("ROCM_PATH") or (CACHE / "hip").exists())


def make_hip(folder: pathlib.Path) -> None:
    """Headers of Debian's ROCm packages, whichever Debian or Ubuntu this is."""
    if not can_have_hip():
        sys.exit(f"ROCm headers: {HIP_NEEDS}")
    apt = folder.parent / "apt"
    for part in ("lists/partial", "cache/archives/partial", "packages"):
        (apt / part).mkdir(parents=True)
    apt = apt.resolve()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {DEBIAN} main\n")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", "-q"] + [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(command + ["update"], check=True)
    subprocess.run(command + ["download"] + ROCM_PACKAGES, check=True, cwd=apt / "packages")
    for package in sorted((apt / "packages").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, apt / "root"], check=True)
    shutil.copytree(apt / "root/usr/include", folder, dirs_exist_ok=True)


def make_hipify(folder: pathlib.Path) -> None:
    """torch/utils/hipify, three files of the wheel."""
    for place in ("utils/hipify", "hipify"):
        if (LIBTORCH / place / "hipify_python.py").exists():
            shutil.copytree(LIBTORCH / place, folder / "hipify")
            return
    print("fetching torch's wheel for its hipify (a libtorch of today's scripts/setup has it)", flush=True)
    wheel = libtorch.download(f"torch=={libtorch.TORCH}", folder, None)
    libtorch.extract(wheel, folder, libtorch.place_hipify)
    wheel.unlink()


def make_rocm_torch(folder: pathlib.Path) -> None:
    """libtorch's headers as a ROCm torch has them."""
    sys.path.insert(0, str(once(CACHE / "hipify", make_hipify).resolve()))
    from hipify import hipify_python

    shutil.copytree(LIBTORCH / "include", folder, dirs_exist_ok=True)
    root = str(folder.resolve())
    hipify_python.hipify(
        project_directory=root,
        output_directory=root,
        includes=[f"{root}/{pattern}" for pattern in HIPIFIED],
        show_progress=False,
        hip_clang_launch=True,
    )


def commands(torch: pathlib.Path, headers: list[pathlib.Path], defines: list[str]) -> list[list[str]]:
    """One compilation for each file of the shim."""
    include = [torch, torch / "torch/csrc/api/include"] + headers
    options = ["g++", "-std=c++17", "-O0", "-fPIC", "-c", "-o", os.devnull, f"-I{SHIM}"]
    options += [word for folder in include for word in ("-isystem", str(folder))]
    options += [f"-D{define}" for define in ["USE_C10D_GLOO", "USE_C10D_NCCL"] + defines]
    return [options + [str(source)] for source in sorted(SHIM.glob("*.cpp"))]


def cuda() -> list[list[str]]:
    headers = once(CACHE / "cuda", make_cuda)
    stand_ins = CACHE / "stand-ins"
    stand_ins.mkdir(exist_ok=True)
    for name, text in CUDA_STAND_INS.items():
        (stand_ins / name).write_text("#pragma once\n" + text)
    return commands(LIBTORCH / "include", [headers, headers / "cccl", stand_ins], [])


def rocm() -> list[list[str]]:
    installed = os.environ.get("ROCM_PATH")
    hip = pathlib.Path(installed, "include") if installed else once(CACHE / "hip", make_hip)
    torch = once(CACHE / "rocm-torch", make_rocm_torch)
    return commands(torch, [hip], ["USE_ROCM", "__HIP_PLATFORM_AMD__=1", "HIPBLAS_V2"])


FLAVOURS = {"cuda": cuda, "rocm": rocm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("flavours", nargs="*", metavar="FLAVOUR", help="cuda or rocm; both unless one is named")
    asked = parser.parse_args().flavours
    flavours = asked
    for flavour in flavours:
        if flavour not in FLAVOURS:
            parser.error(f"{flavour} is not cuda or rocm")
    if not flavours:
        flavours = list(FLAVOURS)
        if not can_have_hip():
            flavours.remove("rocm")
            print(f"ROCm is skipped: {HIP_NEEDS}", flush=True)

    prepared = []
    for flavour in flavours:
        try:
            prepared += [(flavour, command) for command in FLAVOURS[flavour]()]
        except (OSError, subprocess.CalledProcessError, SystemExit) as error:
            if asked:
                raise
            print(f"{flavour} is skipped: its headers cannot be had: {error}", flush=True)
    start = time.time()
    # Side by side: two headers' worth of templates each, and as many cores as a small machine has.
    running = [(flavour, command[-1], subprocess.Popen(command)) for flavour, command in prepared]
    failed = 0
    for flavour, source, process in running:
        well = process.wait() == 0
        failed += not well
        print(f"{source} {'compiles' if well else 'DOES NOT COMPILE'} for {flavour}", flush=True)
    print(f"{len(running) - failed} passed, {failed} failed in {time.time() - start:.2f}s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
