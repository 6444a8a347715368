"""Compiles kernels/gpu for the GPUs whose objects the server embeds, and judges what came out: see scripts/gpu-kernels.

The compilers come from pinned pip packages, into target/gpu/tools: Zig's clang (LLVM 21, with all of AMD's targets) and
NVIDIA's nvcc. No GPU, driver or SDK is needed.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels/gpu"
OBJECTS = SOURCE / "objects"
OUT = ROOT / "target/gpu"
TOOLS = pathlib.Path(os.environ.get("GPU_TOOLS", OUT / "tools"))

AMD_PACKAGES = ["ziglang==0.16.0"]
NVIDIA_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.51",
    "nvidia-cuda-nvdisasm==13.2.51",
]
RTC_PACKAGE = "nvidia-cuda-nvrtc==13.0.88"

# MI200, MI300, MI350, Radeon RX 7900, Radeon RX 9070; A100 (and what runs its code), H100, and PTX for what comes after.
AMD = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]
NVIDIA = ["sm_80", "sm_90"]
AMD_FLAGS = "-nogpuinc -nogpulib -mcode-object-version=5 -fuse-cuid=none -O3 -std=c++20 -Wall -Werror -Wno-pass-failed --cuda-device-only".split()
NVIDIA_FLAGS = "-std=c++17 -O3 -compress-mode=size -Werror all-warnings".split()
FATBIN = "cuda.fatbin"
# What a block may share: 64 KiB on AMD, 48 KiB on NVIDIA (more only on request at launch, which nobody makes here).
SHARED_LIMIT = {"gfx": 64 << 10, "sm_": 48 << 10}


class Failed(Exception):
    pass


def run(command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if result.returncode:
        raise Failed(f"{result.stdout}{result.stderr}\nfailed: {' '.join(map(str, command))}")
    return result.stdout


def install(packages):
    """Installs the packages once; the stamp carries their versions."""
    stamp = TOOLS / ("installed-" + hashlib.sha256(" ".join(packages).encode()).hexdigest()[:16])
    if not stamp.exists():
        print("installing", *packages, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
        run([*pip, "--no-deps", "--upgrade", "--target", TOOLS, *packages])
        stamp.touch()


def sources(name="kernels.cu"):
    """A file of the source and those it includes, in the order in which they are first met. emu.h is the CPU's alone."""
    found = []

    def visit(name):
        if name in found or name == "emu.h":
            return
        text = (SOURCE / name).read_text()
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.M):
            visit(included)
        found.append(name)

    visit(name)
    return found


def digest():
    """As kernels/src/gpu/objects.rs computes it."""
    sha = hashlib.sha256()
    for name in sources():
        data = (SOURCE / name).read_bytes()
        sha.update(f"{name} {len(data)}\n".encode() + data)
    return sha.hexdigest()


def kernels():
    return re.findall(r"^GPU_KERNEL\((\w+)\)", (SOURCE / "kernels.def").read_text(), re.M)


def compile_amd(target, folder):
    """Compiles to assembly, which the gates read, and makes the object of that."""
    zig = TOOLS / "ziglang/zig"
    listing, relocatable = folder / f"{target}.s", folder / f"{target}.o"
    run([zig, "clang", "-x", "hip", f"--offload-arch={target}", *AMD_FLAGS, "-S", "kernels.cu", "-o", listing], cwd=SOURCE)
    machine = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={target}", "-mcode-object-version=5"]
    run([zig, "clang", *machine, "-c", listing, "-o", relocatable])
    run([zig, "ld.lld", "-shared", "--no-undefined", "--strip-debug", relocatable, "-o", folder / f"{target}.hsaco"])


def cuda(tool):
    return TOOLS / "nvidia/cu13/bin" / tool


def compile_nvidia(folder):
    targets = [f"-gencode=arch=compute_{target[3:]},code={target}" for target in NVIDIA]
    newest = f"compute_{NVIDIA[-1][3:]}"
    targets.append(f"-gencode=arch={newest},code={newest}")
    # Its temporary files' names become part of the object: so they have one name on every machine.
    scratch = folder / "nvcc"
    scratch.mkdir(exist_ok=True)
    keep = ["--keep", "--keep-dir", scratch]
    run([cuda("nvcc"), *NVIDIA_FLAGS, *keep, "-fatbin", *targets, "kernels.cu", "-o", folder / FATBIN], cwd=SOURCE)


def compile_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    install(AMD_PACKAGES)
    install(NVIDIA_PACKAGES)
    # Minutes, so not twice for the same.
    stamp = folder / "compiled"
    made = " ".join([digest(), *AMD_PACKAGES, *AMD_FLAGS, *AMD, *NVIDIA_PACKAGES, *NVIDIA_FLAGS, *NVIDIA])
    if stamp.exists() and stamp.read_text() == made:
        return
    stamp.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(compile_nvidia, folder)]
        work += [pool.submit(compile_amd, target, folder) for target in AMD]
        for done in work:
            done.result()
    stamp.write_text(made)


def manifest(folder):
    """One line an object: its name, the digest of its bytes, the compiler and its flags; before them the source's digest."""
    lines = [f"source {digest()}", f"kernels {' '.join(kernels())}"]
    for target in AMD:
        lines.append(line(folder, f"{target}.hsaco", AMD_PACKAGES, AMD_FLAGS))
    lines.append(line(folder, FATBIN, NVIDIA_PACKAGES, [*NVIDIA_FLAGS, *NVIDIA]))
    return "\n".join(lines) + "\n"


def line(folder, name, packages, flags):
    return " ".join([name, hashlib.sha256((folder / name).read_bytes()).hexdigest(), *packages, *flags])


def build():
    compile_all(OUT)
    OBJECTS.mkdir(exist_ok=True)
    for old in OBJECTS.iterdir():
        old.unlink()
    for name in [*(f"{target}.hsaco" for target in AMD), FATBIN]:
        (OBJECTS / name).write_bytes((OUT / name).read_bytes())
    (OBJECTS / "manifest").write_text(manifest(OUT))
    sizes = [f"{path.name} {path.stat().st_size:,}" for path in sorted(OBJECTS.iterdir())]
    print("kernels/gpu/objects:", ", ".join(sizes))


# ---- What a kernel uses, and the gates.

# Bytes a lane of the loads from memory, by the name of the instruction.
AMD_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}


def amd_uses(target, folder):
    """{kernel: what it uses}, from the assembly that the object was made of."""
    text = (folder / f"{target}.s").read_text()
    found = {}
    for name in re.findall(r"^\s+\.amdhsa_kernel (\w+)", text, re.M):
        body = re.search(rf"^{name}:.*?^\.Lfunc_end\d+:", text, re.M | re.S).group()
        after = text[text.index(body) + len(body) :]
        number = lambda key: int(re.search(rf"^; {key}: (\d+)", after, re.M).group(1))
        meta = re.search(rf"^    \.name: +{name}\n.*?(?=^  - |^amdhsa)", text, re.M | re.S).group()
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count: (\d+)", meta))
        widths = [AMD_WIDTHS.get(kind, 2) for kind in re.findall(r"^\s+(?:global|flat|buffer)_load_(?:lds_)?(\w+)", body, re.M)]
        found[name] = {
            "registers": number("TotalNumVgprs" if target.startswith("gfx9") else "NumVgprs"),
            "waves": number("Occupancy"),
            "shared": number("LDSByteSize"),
            "spilled": spills + number("ScratchSize"),
            "widths": widths,
        }
    return found


def nvidia_uses(folder):
    """{target: {kernel: what it uses}}, from the object itself."""
    found = {target: {} for target in NVIDIA}
    resources = run([cuda("cuobjdump"), "-res-usage", folder / FATBIN])
    for part in resources.split("Fatbin elf code:")[1:]:
        target = re.search(r"arch = (\w+)", part).group(1)
        for name, rest in re.findall(r"Function (\w+):\n\s*(.*)", part):
            number = lambda key: int(re.search(rf"{key}:(\d+)", rest).group(1))
            registers = number("REG")
            found[target][name] = {
                "registers": registers,
                # 64 Ki registers for four schedulers, handed out by 8 a thread, at most 16 warps each.
                "waves": min(16, 65536 // 4 // 32 // (-(-registers // 8) * 8)),
                "shared": max(0, number("SHARED") - (1024 if target >= "sm_90" else 0)),  # which the system takes there
                "spilled": number("STACK") + number("LOCAL"),
                "widths": [],
            }
    for target in NVIDIA:
        environment = {**os.environ, "PATH": f"{cuda('')}:{os.environ['PATH']}"}
        listing = run([cuda("cuobjdump"), "-sass", "-arch", target, folder / FATBIN], env=environment)
        for part in re.split(r"^\s+Function : ", listing, flags=re.M)[1:]:
            uses = found[target][part.split()[0]]
            for kind in re.findall(r"\bLDG\.([\w.]+)", part):
                uses["widths"].append({"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.get(kind.split(".")[-1], 4))
    return found


def loads(widths):
    """`12 x 16, 3 x 4`: how many of how many bytes."""
    return ", ".join(f"{widths.count(size)} x {size}" for size in sorted(set(widths), reverse=True)) or "-"


def wide():
    """{kernel: bytes} of the kernels whose source says `loads: N bytes a lane` above them."""
    promise = r"^//.*\bloads: (\d+) bytes a lane.*\n(?://.*\n)*KERNEL LAUNCH\([^)]*\) (\w+)\("
    return {kernel: int(size) for name in sources() for size, kernel in re.findall(promise, (SOURCE / name).read_text(), re.M)}


def table():
    """Every kernel on every target; returns what breaks a gate."""
    uses = {target: amd_uses(target, OUT) for target in AMD} | nvidia_uses(OUT)
    broken, widest = [], wide()
    rows = [["kernel", "target", "registers", "waves", "shared", "spilled", "loads (number x bytes a lane)"]]
    for name in kernels():
        for target, found in uses.items():
            use = found.get(name)
            if use is None:
                broken.append(f"{name} is not in the object for {target}")
                continue
            rows.append([name, target, *(str(use[key]) for key in ("registers", "waves", "shared", "spilled")), loads(use["widths"])])
            if use["spilled"]:
                broken.append(f"{name} on {target}: {use['spilled']} spilled registers or bytes of scratch")
            if use["shared"] > SHARED_LIMIT[target[:3]]:
                broken.append(f"{name} on {target}: {use['shared']} bytes shared, of {SHARED_LIMIT[target[:3]]}")
            if max(use["widths"], default=0) < widest.get(name, 0):
                broken.append(f"{name} on {target}: no load of {widest[name]} bytes a lane, as its source promises")
    for target, found in uses.items():
        broken += [f"{name} for {target} is not in kernels.def" for name in found if name not in kernels()]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * size for size in sizes])
    for row in rows:
        print("| " + " | ".join(cell.ljust(size) for cell, size in zip(row, sizes)) + " |")
    return broken


def judge(against_objects):
    """Builds anew, beside the objects that lie here: every kernel keeps to the gates, and the objects have the same bytes."""
    compile_all(OUT)
    broken = table()
    if against_objects and (OBJECTS / "manifest").read_text() != manifest(OUT):
        broken.append("kernels/gpu/objects is not what today's source, compilers and flags make: scripts/gpu-kernels build")
    for line in broken:
        print("BROKEN", line)
    print(f"{len(kernels())} kernels on {len(AMD) + len(NVIDIA)} targets:", f"{len(broken)} broken" if broken else "ok")
    return 1 if broken else 0


def nvrtc():
    """Prints where NVIDIA's compiler at run time lies, for scripts/gpu-kernels rtc."""
    with contextlib.redirect_stdout(sys.stderr):
        install([RTC_PACKAGE])
    print(TOOLS / "nvidia/cu13/lib/libnvrtc.so.13")


if __name__ == "__main__":
    try:
        status = {"rtc": nvrtc, "build": build, "check": lambda: judge(True), "table": lambda: judge(False)}[sys.argv[1]]()
    except Failed as error:
        status = str(error)
    sys.exit(status)
