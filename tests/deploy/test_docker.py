"""The Dockerfile and the Compose file by the rules that older engines need, and against the program's own options."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from options import ROOT, commands, flags, variables

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE_FILE = ROOT / "docker/compose.yaml"
SETTINGS = ROOT / "docker/.env.example"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES = COMPOSE["services"]
IMAGES = ("tandem:cpu", "tandem:cuda", "tandem:rocm")
TANDEM = [name for name, service in SERVICES.items() if service["image"] in IMAGES]
FLEET = {"postgres", "s3"}
PROFILES = {
    "cpu": {"serve"},
    "rocm": {"serve-rocm"},
    "cuda": {"serve-cuda"},
    "fleet": {"router", "backend-1", "backend-2"} | FLEET,
    "fleet-rocm": {"router-rocm", "backend-1-rocm", "backend-2-rocm"} | FLEET,
    "fleet-cuda": {"router-cuda", "backend-1-cuda", "backend-2-cuda"} | FLEET,
}
# Options that a container has decided: where it listens inside, where its volume is.
DECIDED = {"TANDEM_HOST", "TANDEM_PORT", "TANDEM_LISTEN", "TANDEM_DATA_DIR"}
# Whoever sets these means the router, where people come in.
OF_ROUTERS = {"TANDEM_SSL_CA_CERTS", "TANDEM_SSL_CERTFILE", "TANDEM_SSL_CERT_REQS", "TANDEM_SSL_KEYFILE"}


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


def test_the_s3_server_is_stopped_by_a_signal_that_it_handles():
    [stage] = re.findall(r"^FROM \$\{RUNTIME_IMAGE\} AS s3\n(.*?)^FROM ", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert "STOPSIGNAL SIGINT" in stage


def test_profiles_hold_what_the_readme_says():
    found = {profile: set() for profile in PROFILES}
    for name, service in SERVICES.items():
        for profile in service["profiles"]:
            found[profile].add(name)
    assert found == PROFILES
    default = re.search(r"^COMPOSE_PROFILES=(.*)$", SETTINGS.read_text(), re.MULTILINE)
    assert default.group(1) == "cpu"


def test_git_tracks_no_settings_and_no_keys():
    for name, kept in (("docker/.env", False), ("docker/api-keys", False), ("docker/.env.example", True)):
        ignored = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0
        assert ignored is not kept, name
    assert "KEY=" not in SETTINGS.read_text()


@pytest.mark.parametrize("profile", PROFILES)
def test_one_service_builds_an_image_and_the_others_wait_for_it(profile):
    """Two builds of one tag at once fail on the containerd image store; a pull of it would find somebody else's."""
    builders = {}
    for name in sorted(PROFILES[profile]):
        if "build" in SERVICES[name]:
            image = SERVICES[name]["image"]
            assert image not in builders, f"{name} and {builders[image]} build {image}"
            builders[image] = name
    for name in PROFILES[profile]:
        service = SERVICES[name]
        if service["image"] in IMAGES and "build" not in service:
            assert service["pull_policy"] == "never"
            assert builders[service["image"]] in service["depends_on"], name


def test_every_service_that_builds_can_take_certificates():
    extra = yaml.safe_load((ROOT / "docker/compose.ca.yaml").read_text())["services"]
    assert extra.keys() == {name for name, service in SERVICES.items() if "build" in service}
    assert all(service == {"build": {"secrets": ["ca"]}} for service in extra.values())


@pytest.mark.parametrize("name", TANDEM)
def test_services_take_every_option_that_exists(name):
    service = SERVICES[name]
    command, *arguments = service.get("command", ["serve"])
    assert command in commands()
    assert {argument for argument in arguments if argument.startswith("--")} <= flags(command)
    ours = {variable for variable in service["environment"] if variable.startswith("TANDEM_")}
    every = variables(command) - {"TANDEM_VERSION", "TANDEM_HELP"} - DECIDED
    every -= OF_ROUTERS if command == "backend" else set()
    assert ours == every, f"unknown: {ours - every}, cannot be set: {every - ours}"
    _, *check = service["healthcheck"]["test"]
    assert check[:2] == ["tandem", "health"]
    assert {argument for argument in check if argument.startswith("--")} <= flags("health")


@pytest.mark.parametrize("name", TANDEM)
def test_who_may_come_and_with_which_key(name):
    service = SERVICES[name]
    if service.get("command") == ["backend"]:
        assert "ports" not in service, "the token is a default that everybody knows: only this network reaches backends"
        [token] = {SERVICES[other]["environment"]["TANDEM_BACKEND_TOKEN"] for other in TANDEM if "backend" in other or "router" in other}
        assert service["environment"]["TANDEM_BACKEND_TOKEN"] == token
        return
    assert service["ports"] == ["${PUBLISH:-127.0.0.1:8000}:8000"]
    environment = service["environment"]
    # The server refuses to be published beyond this machine without keys: it must know where it is published.
    assert environment["TANDEM_PUBLISHED"] == "${PUBLISH:-127.0.0.1:8000}"
    assert environment["TANDEM_API_KEY_FILE"] == "/run/secrets/api-keys" and service["secrets"] == ["api-keys"]
    assert COMPOSE["secrets"] == {"api-keys": {"file": "${API_KEYS:-/dev/null}"}}


@pytest.mark.parametrize("name", TANDEM)
def test_containers_get_no_more_than_they_need(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"], "an unconfined process could do more than it needs"
    assert service["read_only"] is True and "ipc" not in service and "privileged" not in service
    assert service["restart"] == "${RESTART:-on-failure:5}"


GPU = [name for name in TANDEM if name.endswith(("-rocm", "-cuda")) and not name.startswith("router")]


@pytest.mark.parametrize("name", GPU)
def test_the_gpu_profiles_give_what_a_gpu_needs(name):
    service = SERVICES[name]
    environment = service["environment"]
    assert service["shm_size"] == "16gb" and service["ulimits"] == {"memlock": -1, "stack": 67108864}
    # One of them alone, or the runtime hides devices twice.
    assert len([variable for variable in environment if variable.endswith("_VISIBLE_DEVICES")]) == 1
    # The container fails without a GPU, instead of serving slowly.
    assert environment["TANDEM_DEVICE"] == "${TANDEM_DEVICE:-cuda}"
    if name.endswith("-rocm"):
        assert service["devices"] == ["/dev/kfd", "/dev/dri"]
        assert len(set(service["group_add"])) == 2, "video and render differ"
        assert {"HSA_NO_SCRATCH_RECLAIM", "HIP_FORCE_DEV_KERNARG", "NCCL_MIN_NCHANNELS"} <= environment.keys()
    else:
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("flavour", ["rocm", "cuda"])
def test_backends_of_a_gpu_fleet_have_different_gpus(flavour):
    variable = {"rocm": "HIP_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}[flavour]
    given = [SERVICES[f"backend-{n}-{flavour}"]["environment"][variable] for n in (1, 2)]
    assert given == ["${BACKEND_1_GPUS:-0}", "${BACKEND_2_GPUS:-1}"]


@pytest.mark.parametrize("flavour", ["", "-rocm", "-cuda"])
def test_routers_are_told_their_backends(flavour):
    told = SERVICES["router" + flavour]["environment"]["TANDEM_BACKEND"]
    names = [f"http://backend-{n}{flavour}:8001" for n in (1, 2)]
    assert told == "${TANDEM_BACKEND:-" + ",".join(names) + "}"


@pytest.mark.skipif(compose_command() is None, reason="Compose, which reads the file, is not installed")
@pytest.mark.parametrize("profile", PROFILES)
def test_compose_reads_it(profile):
    command = [*compose_command(), "--env-file", str(SETTINGS), "-f", str(COMPOSE_FILE), "--profile", profile, "config"]
    result = subprocess.run(command, capture_output=True, text=True, env=settings())
    assert result.returncode == 0, result.stderr
    assert "obsolete" not in result.stderr, result.stderr
    assert PROFILES[profile] <= yaml.safe_load(result.stdout)["services"].keys()


@pytest.mark.skipif(compose_command() is None, reason="Compose, which reads the file, is not installed")
def test_options_of_the_shell_arrive():
    sent = {name: "7" for name in variables("serve") - DECIDED if name in SERVICES["serve"]["environment"]}
    sent |= {"PUBLISH": "127.0.0.1:9", "MODELS": "/srv/models", "API_KEYS": str(SETTINGS)}
    command = [*compose_command(), "--env-file", str(SETTINGS), "-f", str(COMPOSE_FILE), "--profile", "cpu", "config"]
    result = subprocess.run(command, capture_output=True, text=True, env=settings() | sent)
    assert result.returncode == 0, result.stderr
    environment = yaml.safe_load(result.stdout)["services"]["serve"]["environment"]
    for name in sent.keys() - {"PUBLISH", "MODELS", "API_KEYS", "TANDEM_API_KEY_FILE", "TANDEM_PUBLISHED"}:
        assert environment[name] == "7", name
    assert environment["TANDEM_PUBLISHED"] == "127.0.0.1:9"


@pytest.mark.skipif(compose_command() is None, reason="Compose, which reads the file, is not installed")
def test_relative_paths_begin_where_the_readme_says():
    sent = {"MODELS": "./models", "API_KEYS": "./.env.example"}
    command = [*compose_command(), "--env-file", str(SETTINGS), "-f", str(COMPOSE_FILE), "--profile", "cpu", "config"]
    result = subprocess.run(command, capture_output=True, text=True, env=settings() | sent, cwd="/")
    assert result.returncode == 0, result.stderr
    assert f"{ROOT}/docker/models" in result.stdout and f"{ROOT}/docker/.env.example" in result.stdout
    assert "a relative one begins at `docker/`" in (ROOT / "docker/README.md").read_text()


def settings():
    """This process's environment without what a deployment set in it."""
    read = set(re.findall(r"\$\{(\w+)", COMPOSE_FILE.read_text()))
    return {name: v for name, v in os.environ.items() if name not in read and not name.startswith("TANDEM_")}
