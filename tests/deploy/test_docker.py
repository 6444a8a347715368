"""The Dockerfile and the Compose file by the rules that older engines need, and against the program's own options."""

import re
import shutil
import subprocess

import pytest
import yaml

from options import ROOT, commands, flags, variables

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE_FILE = ROOT / "docker/compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES = COMPOSE["services"]
IMAGES = ("tandem:cpu", "tandem:cuda", "tandem:rocm")
TANDEM = [name for name, service in SERVICES.items() if service["image"] in IMAGES]
PROFILES = {
    "cpu": {"serve"},
    "rocm": {"serve-rocm"},
    "cuda": {"serve-cuda"},
    "fleet": {"router", "backend-1", "backend-2", "postgres", "s3"},
}


def compose_command():
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    return None


def test_the_dockerfile_is_one_an_older_engine_reads():
    lines = DOCKERFILE.splitlines()
    assert not lines[0].startswith("# syntax"), "a frontend would have to be pulled"
    assert "<<" not in DOCKERFILE, "here-documents want a newer frontend"
    assert "--link" not in DOCKERFILE
    assert re.search(r"^USER 10001", DOCKERFILE, re.MULTILINE)
    # What is copied from the checkout is in it, and the context holds it.
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.split()[1:]
            for source in sources:
                assert (ROOT / source).exists(), line
                top = source.split("/")[0]
                assert top not in ignored or f"!{source}" in ignored, line


def test_the_image_sets_options_that_exist():
    names = set(re.findall(r"(TANDEM_[A-Z_]+)=", DOCKERFILE))
    every = variables("serve") | variables("backend") | variables("router")
    assert names and names <= every, names - every


def test_profiles_hold_what_the_readme_says():
    found = {profile: set() for profile in PROFILES}
    for name, service in SERVICES.items():
        for profile in service["profiles"]:
            found[profile].add(name)
    assert found == PROFILES
    default = re.search(r"^COMPOSE_PROFILES=(.*)$", (ROOT / "docker/.env").read_text(), re.MULTILINE)
    assert default.group(1) == "cpu"


@pytest.mark.parametrize("name", TANDEM)
def test_services_use_options_that_exist(name):
    service = SERVICES[name]
    command, *arguments = service.get("command", ["serve"])
    assert command in commands()
    assert {argument for argument in arguments if argument.startswith("--")} <= flags(command)
    ours = {variable for variable in service["environment"] if variable.startswith("TANDEM_")}
    assert ours <= variables(command), ours - variables(command)
    _, *check = service["healthcheck"]["test"]
    assert check[:2] == ["tandem", "health"]
    assert {argument for argument in check if argument.startswith("--")} <= flags("health")


def test_the_gpu_profiles_give_what_a_gpu_needs():
    rocm = SERVICES["serve-rocm"]
    assert rocm["devices"] == ["/dev/kfd", "/dev/dri"]
    assert len(set(rocm["group_add"])) == 2, "video and render differ"
    assert rocm["cap_add"] == ["SYS_PTRACE"] and rocm["security_opt"] == ["seccomp=unconfined"]
    assert {"HSA_NO_SCRATCH_RECLAIM", "HIP_FORCE_DEV_KERNARG", "NCCL_MIN_NCHANNELS"} <= rocm["environment"].keys()
    # One of them alone, or the runtime hides devices twice.
    visible = [variable for variable in rocm["environment"] if variable.endswith("_VISIBLE_DEVICES")]
    assert len(visible) == 1
    for service in (rocm, SERVICES["serve-cuda"]):
        assert service["ipc"] == "host" and service["shm_size"] == "16gb"
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    [device] = SERVICES["serve-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


@pytest.mark.skipif(compose_command() is None, reason="Compose, which reads the file, is not installed")
@pytest.mark.parametrize("profile", PROFILES)
def test_compose_reads_it(profile):
    command = [*compose_command(), "-f", str(COMPOSE_FILE), "--profile", profile, "config"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert PROFILES[profile] <= yaml.safe_load(result.stdout)["services"].keys()
