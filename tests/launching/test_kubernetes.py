"""`launch/kubernetes/`: fields and types as Kubeflow's and Kubernetes' published models have them; and what runs."""

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
KINDS = {
    ("kubeflow.org/v1", "PyTorchJob"): "KubeflowOrgV1PyTorchJob",
    ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
}
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")


def model_of(kind: str) -> Any:
    """Imported here: the models take two seconds, in every process that collects."""
    kubeflow = pytest.importorskip(
        "kubeflow.training.models", reason="needs kubeflow-training (the extra dev)"
    )
    kubernetes = pytest.importorskip("kubernetes.client.models", reason="needs kubernetes (the extra dev)")
    return getattr(kubeflow, kind, None) or getattr(kubernetes, kind)


def problems(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """Fields that a type does not have, and values of other types; the types' names are those of the models."""
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for index, item in enumerate(value):
            yield from problems(item, inner[1], f"{where}[{index}]")
    elif inner := re.fullmatch(r"dict[(\[]str, (.+)[)\]]", kind):
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no mapping"
            return
        for key, item in value.items():
            # Amounts are text or numbers in Kubernetes' own definition, which the models make `str`.
            amount = re.search(r"\.(requests|limits)$", where) is not None
            yield from problems(item, "quantity" if amount else inner[1], f"{where}.{key}")
    elif kind == "quantity":
        if not QUANTITY.fullmatch(str(value)):
            yield f"{where}: {value!r} is no amount"
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind in ("int", "float")):
            yield f"{where}: {value!r} is no {kind}"
    else:
        yield from _fields(value, model_of(kind), where)


def _fields(value: Any, model: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no mapping"
        return
    types = {model.attribute_map[name]: (name, kind) for name, kind in model.openapi_types.items()}
    for key, item in value.items():
        if key not in types:
            yield f"{where}.{key}: {model.__name__} has no such field"
        else:
            yield from problems(item, types[key][1], f"{where}.{key}")
    known = {types[key][0]: item for key, item in value.items() if key in types}
    try:  # the models refuse what is missing or not one of the allowed words
        model(**known)
    except ValueError as error:
        yield f"{where}: {error}"


def of_manifest(manifest: dict[str, Any]) -> list[str]:
    return list(problems(manifest, KINDS[manifest["apiVersion"], manifest["kind"]]))


def load(name: str) -> dict[str, Any]:
    results: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return results


def rendered(folder: str) -> list[dict[str, Any]]:
    tools = (["kubectl", "kustomize"], ["kustomize", "build"])
    tool = next((tool for tool in tools if shutil.which(tool[0])), None)
    if tool is None:
        pytest.skip("needs kubectl or kustomize")
    done = subprocess.run([*tool, FOLDER / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def job() -> dict[str, Any]:
    return load("job/pytorchjob.yaml")


def worker(job: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    return results


def container(job: dict[str, Any]) -> dict[str, Any]:
    (results,) = worker(job)["template"]["spec"]["containers"]
    assert isinstance(results, dict)
    return results


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "checkpoints.yaml"])
def test_manifests_hold_what_their_types_have(name: str) -> None:
    assert of_manifest(load(f"job/{name}")) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "elasticPolicy", "rdzvBackendd"), "c10d", "ElasticPolicy has no such field"),
        (("spec", "runPolicy", "backoffLimit"), "10", "'10' is no int"),
        (("spec", "pytorchReplicaSpecs", "Worker", "replicas"), True, "True is no int"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "containers"), {}, "is no list"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "volume"), [], "V1PodSpec has no"),
        (("spec", "pytorchReplicaSpecs"), [], "[] is no mapping"),
    ],
)
def test_wrong_fields_are_refused(
    job: dict[str, Any], path: tuple[str, ...], value: Any, message: str
) -> None:
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (results,) = of_manifest(job)
    assert results.startswith("." + ".".join(path))
    assert message in results


def test_missing_fields_and_wrong_amounts_are_refused(job: dict[str, Any]) -> None:
    changed = copy.deepcopy(job)
    del container(changed)["name"]
    assert any("`name`, must not be `None`" in results for results in of_manifest(changed))
    container(job)["resources"]["limits"]["memory"] = "512 GB"
    assert [results.rsplit(": ", 1)[1] for results in of_manifest(job)] == ["'512 GB' is no amount"]


def operators_environment(job: dict[str, Any]) -> dict[str, str]:
    """What Kubeflow's operator adds for an elastic job, as its source has it (pkg/controller.v1/pytorch/elastic.go)."""
    policy, workers = job["spec"]["elasticPolicy"], worker(job)["replicas"]
    host = f"{job['metadata']['name']}-worker-0"
    sizes = (policy[key] for key in ("minReplicas", "maxReplicas")) if "minReplicas" in policy else (workers,)
    return {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"{host}:{policy['rdzvPort']}",
        "PET_NNODES": ":".join(map(str, sizes)),
    }


def dry_run(job: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """What the container's command would run, and torchrun's options among it."""
    pod = container(job)
    environment = {one["name"]: one["value"] for one in pod["env"]} | operators_environment(job)
    words = [
        re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), word)
        for word in [*pod["command"], "--dry-run", *pod["args"]]
    ]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        words, env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines[0] == [
        "export",
        *(f"{kind}_SOCKET_IFNAME=eth0" for kind in ("NCCL", "GLOO", "TP")),
    ]
    (line,) = lines[1:]
    options = dict(word.removeprefix("--").split("=", 1) for word in line if re.match(r"--[\w-]+=", word))
    return line, options


def assert_joins_its_first_pod(job: dict[str, Any], options: dict[str, str]) -> None:
    operator = operators_environment(job)
    assert options["rdzv-backend"] == operator["PET_RDZV_BACKEND"]
    assert options["rdzv-endpoint"] == operator["PET_RDZV_ENDPOINT"]
    assert options["nnodes"] == operator["PET_NNODES"]
    assert options["nproc-per-node"] == container(job)["resources"]["limits"]["nvidia.com/gpu"]
    (port,) = container(job)["ports"]
    assert (port["name"], port["containerPort"]) == (
        "pytorchjob-port",
        job["spec"]["elasticPolicy"]["rdzvPort"],
    )


def test_the_operators_settings_reach_torchrun(job: dict[str, Any]) -> None:
    line, options = dry_run(job)
    assert_joins_its_first_pod(job, options)
    assert line[-len(container(job)["args"]) :] == container(job)["args"]
    job["spec"]["elasticPolicy"] |= {"minReplicas": 2, "maxReplicas": 4}
    assert of_manifest(job) == []
    assert dry_run(job)[1]["nnodes"] == "2:4"


def test_volumes_are_there_and_the_recipe_writes_to_the_shared_one(job: dict[str, Any]) -> None:
    pod = worker(job)["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(job)["volumeMounts"]}
    claim = mounts["/shared"]["persistentVolumeClaim"]["claimName"]
    assert claim == load("job/checkpoints.yaml")["metadata"]["name"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    settings = dict(word.split("=", 1) for word in container(job)["args"] if re.match(r"[\w.]+=", word))
    assert all(value.strip("[").startswith("/shared/") for value in settings.values())
    assert (ROOT / "configs" / Path(container(job)["args"][3]).name).exists()
    shutdown = next(one["value"] for one in container(job)["env"] if one["name"] == "PET_SHUTDOWN_TIMEOUT")
    assert int(shutdown) < pod["terminationGracePeriodSeconds"]


def test_the_preflight_is_the_same_job_with_another_program(job: dict[str, Any]) -> None:
    claim, before = rendered("preflight")
    assert [of_manifest(one) for one in (claim, before)] == [[], []]
    line, options = dry_run(before)
    assert_joins_its_first_pod(before, options)
    assert line[line.index("-m", 3) :][:3] == ["-m", "sharded_lamb", "preflight"]
    assert int(options["world-size"]) == int(options["nnodes"]) * int(options["nproc-per-node"])
    _, main = rendered("job")
    assert worker(before)["replicas"] == worker(main)["replicas"]
    for key in ("resources", "volumeMounts", "image", "securityContext"):
        assert container(before)[key] == container(main)[key]


def test_a_pods_end_reaches_the_ranks(tmp_path: Path) -> None:
    """What Kubernetes ends is the command, with SIGTERM: the ranks save then."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import signal, sys, time, pathlib\n"
        "here = pathlib.Path(__file__).parent\n"
        "def save(*_):\n    (here / 'saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    settings = {"PREFLIGHT": "0", "NPROC_PER_NODE": "1", "MASTER_PORT": "0", "VIRTUAL_ENV": sys.prefix}
    settings |= {"PYTHONPATH": str(ROOT), "RDZV": "c10d"}
    process = subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", program],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, "torchrun.sh ended by itself"
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()
