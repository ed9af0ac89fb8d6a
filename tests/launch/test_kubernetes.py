"""The PyTorchJob manifest against the schemas of the training operator and of Kubernetes, and the command it runs."""

import re
import sys

import pytest

import train
from tests.launch import jobs

yaml = pytest.importorskip("yaml")
training = pytest.importorskip("kubeflow.training", reason="needs kubeflow-training, the operator's schema")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs Kubernetes' schema")

MANIFEST = jobs.ROOT / "launch" / "kubernetes" / "pytorchjob.yaml"


@pytest.fixture
def job():
    return yaml.safe_load(MANIFEST.read_text())


def check(value: object, kind: str, where: str) -> None:
    """Raises AssertionError unless `value` is made of the fields that the operator's generated models declare."""
    inner = re.fullmatch(r"(?:list\[|dict\(str, )(.*)[])]", kind)
    if inner:
        assert isinstance(value, list if kind.startswith("list") else dict), where
        for key, item in enumerate(value) if kind.startswith("list") else value.items():
            check(item, inner[1], f"{where}.{key}")
    elif kind.startswith(("KubeflowOrg", "V1")) and hasattr(training, kind):
        model = getattr(training, kind)
        fields = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
        assert isinstance(value, dict) and set(value) <= set(fields), f"{where}: {set(value) - set(fields)}"
        for key, item in value.items():
            check(item, fields[key], f"{where}.{key}")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{where} = {value!r} should be {kind}"


def test_job_has_only_fields_of_the_operator_in_their_types(job):
    check(job, "KubeflowOrgV1PyTorchJob", "job")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    with pytest.raises(AssertionError, match="maxRestart"):
        check(job | {"spec": job["spec"] | {"elasticPolicy": {"maxRestart": 1}}}, "KubeflowOrgV1PyTorchJob", "job")


def test_pods_are_valid_kubernetes_pods(job):
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "lion"}, "spec": worker["template"]["spec"]}
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(pod, version, strict=True)
    pod["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(pod, version, strict=True)


def test_container_runs_the_training_program_with_flags_that_it_has(job, monkeypatch):
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["command"] == ["torchrun", "launch/train.py"]
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    flags = [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], flag) for flag in container["args"]]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setattr(train, "NODES", 2)
    monkeypatch.setattr(train, "WORLD_SIZE", 16)
    args = train.parse_arguments()
    assert (args.resume, args.replicate, args.steps, args.keep_last) == ("auto", 2, 10000, 3)
    grace = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
