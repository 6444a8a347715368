"""What the built program takes: its commands, flags and TANDEM_* variables, as its own --help says."""

import functools
import os
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("TANDEM_BINARY", ROOT / "target/release/tandem")
# Read by the program, but options of no command.
OTHERS = {"TANDEM_LOG", "TANDEM_CPU_KERNELS", "TANDEM_GPU_KERNELS"}


def help_of(*command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    result = subprocess.run([BINARY, *command, "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def commands():
    return set(re.findall(r"^  ([a-z]+)  ", help_of().split("Commands:")[1], re.MULTILINE))


@functools.cache
def flags(command):
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z0-9-]+)", help_of(command), re.MULTILINE))


@functools.cache
def variables(command):
    """An option --max-loras is the variable TANDEM_MAX_LORAS."""
    return {"TANDEM_" + flag[2:].upper().replace("-", "_") for flag in flags(command)} | OTHERS
