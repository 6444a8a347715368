"""Each overlay as kubectl renders it: built-in kinds against Kubernetes' own schemas, the others by the fields their
definitions require, and the references between objects. Without kubectl the files are checked one by one."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from options import ROOT, variables, commands

KUBERNETES = ROOT / "docker/kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
SCHEMAS = "1.34"
# Beside this Python, where requirements.txt puts it: Debian's is too old for components.
KUBECTL = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, which renders the overlays, is not installed")

# What the definitions of the custom kinds demand: path -> type, along every path that must be there.
CUSTOM = {
    "inference.networking.k8s.io/v1 InferencePool": {
        "spec.selector.matchLabels": dict,
        "spec.targetPorts.0.number": int,
        "spec.endpointPickerRef.name": str,
        "spec.endpointPickerRef.port.number": int,
    },
    "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet": {
        "spec.replicas": int,
        "spec.leaderWorkerTemplate.size": int,
        "spec.leaderWorkerTemplate.leaderTemplate.spec.containers": list,
        "spec.leaderWorkerTemplate.workerTemplate.spec.containers": list,
    },
    "monitoring.coreos.com/v1 ServiceMonitor": {
        "spec.selector.matchLabels": dict,
        "spec.endpoints.0.port": str,
    },
    "gateway.networking.k8s.io/v1 HTTPRoute": {
        "spec.parentRefs.0.name": str,
        "spec.rules.0.backendRefs.0.name": str,
    },
}


def kind(document):
    return f"{document['apiVersion']} {document['kind']}"


def at(document, path):
    """The value at `a.0.b`, or None."""
    for part in path.split("."):
        if isinstance(document, list):
            document = document[int(part)] if int(part) < len(document) else None
        else:
            document = (document or {}).get(part)
    return document


@functools.cache
def render(overlay):
    command = [KUBECTL, "kustomize", str(KUBERNETES / "overlays" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def pods(documents):
    """(workload, pod template) of everything that makes pods."""
    for document in documents:
        for path in (
            "spec.template",
            "spec.leaderWorkerTemplate.leaderTemplate",
            "spec.leaderWorkerTemplate.workerTemplate",
        ):
            if template := at(document, path):
                yield document, template


def check(document):
    if kind(document) in CUSTOM:
        for path, wanted in CUSTOM[kind(document)].items():
            found = at(document, path)
            assert isinstance(found, wanted), f"{kind(document)}: {path} is {found!r}"
        return
    kubernetes_validate.validate(document, SCHEMAS, strict=True)


def as_deployment(template):
    """A custom kind's pod template, where the schemas can see it."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "x"},
        "spec": {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template},
    }


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_are_what_the_schemas_allow(overlay):
    documents = render(overlay)
    for document in documents:
        check(document)
    for document, template in pods(documents):
        if kind(document) in CUSTOM:
            check(as_deployment(template))


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_and_labels_refer_to_something(overlay):
    documents = render(overlay)
    named = {(document["kind"], document["metadata"]["name"]) for document in documents}
    labels = [template["metadata"]["labels"] for _, template in pods(documents)]
    services = [document for document in documents if document["kind"] == "Service"]
    ports = {
        port["name"]
        for _, template in pods(documents)
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }

    def chosen(selector, among):
        return [found for found in among if selector.items() <= found.items()]

    for document in documents:
        match document["kind"]:
            case "Service":
                assert chosen(document["spec"]["selector"], labels), document["metadata"]["name"]
                assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports
            case "PodDisruptionBudget" | "InferencePool":
                assert chosen(document["spec"]["selector"]["matchLabels"], labels), document["metadata"]["name"]
            case "ServiceMonitor":
                of_services = [service["metadata"].get("labels", {}) for service in services]
                assert chosen(document["spec"]["selector"]["matchLabels"], of_services)
            case "HTTPRoute":
                for backend in document["spec"]["rules"][0]["backendRefs"]:
                    assert (backend["kind"], backend["name"]) in named
            case "StatefulSet":
                assert ("Service", document["spec"]["serviceName"]) in named
    for _, template in pods(documents):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for volume in template["spec"]["volumes"]:
            if claim := at(volume, "persistentVolumeClaim.claimName"):
                assert ("PersistentVolumeClaim", claim) in named
            if secret := at(volume, "secret.secretName"):
                # The operator's own, as docker/README.md says.
                assert secret == "tandem-api-keys"
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], f"{volume['name']} may fill the node's disk"
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            for source in container["envFrom"]:
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in named
                else:
                    # The operator's own, as docker/README.md says.
                    own = [{"name": "tandem-state"}, {"name": "tandem-hub", "optional": True}, {"name": "tandem-backend"}]
                    assert source["secretRef"] in own


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_what_the_program_has(overlay):
    documents = render(overlay)
    config = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    for _, template in pods(documents):
        spec = template["spec"]
        # A service named tandem would set TANDEM_PORT, which the program reads.
        assert spec["enableServiceLinks"] is False
        for container in spec["containers"]:
            capabilities = container["securityContext"]["capabilities"]
            assert capabilities["drop"] == ["ALL"]
            # A capability reaches processes of user 0 alone: without one there is no reason to be it.
            assert capabilities.get("add", []) == ([] if spec["securityContext"]["runAsNonRoot"] else ["IPC_LOCK"])
            command, *arguments = container["args"]
            assert command in commands() and not arguments
            names = {variable["name"] for variable in container.get("env", [])}
            for source in container["envFrom"]:
                names |= config.get(at(source, "configMapRef.name"), {}).keys()
            ours = {name for name in names if name.startswith("TANDEM_")}
            assert ours <= variables(command), ours - variables(command)
            if container["image"] != "tandem:cpu" and command != "router":
                gpus = [name for name in container["resources"]["limits"] if name.endswith("/gpu")]
                assert gpus == ["nvidia.com/gpu" if container["image"] == "tandem:cuda" else "amd.com/gpu"]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_finds_and_reaches_what_it_scrapes(overlay):
    documents = render(overlay)
    labels = [template["metadata"]["labels"] for _, template in pods(documents)]
    services = [document for document in documents if document["kind"] == "Service"]
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    for monitor in (document for document in documents if document["kind"] == "ServiceMonitor"):
        assert monitor["metadata"]["labels"]["release"], "the operator's chart chooses by this label"
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        for service in (service for service in services if wanted <= service["metadata"].get("labels", {}).items()):
            scraped = [found for found in labels if service["spec"]["selector"].items() <= found.items()]
            port = monitor["spec"]["endpoints"][0]["port"]
            for policy in policies:
                if not any(policy["spec"]["podSelector"]["matchLabels"].items() <= found.items() for found in scraped):
                    continue
                let_in = [
                    peer
                    for rule in policy["spec"]["ingress"]
                    if {"port": port} in rule["ports"]
                    for peer in rule["from"]
                    if at(peer, "podSelector.matchLabels") == {"app.kubernetes.io/name": "prometheus"}
                ]
                assert let_in and "namespaceSelector" in let_in[0], f"{policy['metadata']['name']} shuts Prometheus out"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_way_in_from_outside_wants_keys(overlay):
    documents = render(overlay)
    if not any(document["kind"] == "HTTPRoute" for document in documents):
        return
    for _, template in pods(documents):
        [volume] = [v for v in template["spec"]["volumes"] if "secret" in v]
        assert "optional" not in volume["secret"], "a pod without the secret must not start"
        [container] = template["spec"]["containers"]
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        assert values["TANDEM_API_KEY_FILE"] == mount["mountPath"] + "/api-keys"


@needs_kubectl
def test_the_claim_of_the_models_can_be_filled():
    documents = render("../fill-models")
    for document in documents:
        check(document)
    claims = {document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"}
    [pod] = [document for document in documents if document["kind"] == "Pod"]
    [container] = pod["spec"]["containers"]
    [mount] = container["volumeMounts"]
    assert {at(v, "persistentVolumeClaim.claimName") for v in pod["spec"]["volumes"]} == claims
    assert mount["mountPath"] == "/models" and "readOnly" not in mount


@needs_kubectl
def test_backends_are_those_the_routers_are_told():
    documents = render("fleet")
    [backend] = [document for document in documents if document["kind"] == "StatefulSet"]
    [told] = [d["data"]["TANDEM_BACKEND"] for d in documents if "TANDEM_BACKEND" in d.get("data", {})]
    name, service = backend["metadata"]["name"], backend["spec"]["serviceName"]
    assert told.split(",") == [f"http://{name}-{i}.{service}:8001" for i in range(backend["spec"]["replicas"])]


@needs_kubectl
def test_ranks_of_several_hosts_know_each_other():
    templates = list(pods(render("multi-host")))
    assert len(templates) == 2
    for _, template in templates:
        [container] = template["spec"]["containers"]
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        expected = {
            "RANK": "$(LWS_WORKER_INDEX)",
            "WORLD_SIZE": "$(LWS_GROUP_SIZE)",
            "MASTER_ADDR": "$(LWS_LEADER_ADDRESS)",
        }
        assert expected.items() <= values.items()
        assert {"LOCAL_RANK", "MASTER_PORT"} <= values.keys()


def test_every_file_is_used_and_valid():
    """Also where kubectl is missing: what kustomizations name exists, every other file is named, documents are valid."""
    used = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        used.add(file)
        kustomization = yaml.safe_load(file.read_text())
        for name in kustomization.get("resources", []) + kustomization.get("components", []):
            target = (file.parent / name).resolve()
            assert target.exists(), f"{file}: {name}"
            used.add(target)
        used |= {file.parent / name for name in kustomization.get("configurations", [])}
    for file in KUBERNETES.rglob("*.yaml"):
        assert file in used, f"nothing uses {file}"
        if file.name in ("kustomization.yaml", "fields.yaml"):
            continue
        for document in yaml.safe_load_all(file.read_text()):
            check(document)
