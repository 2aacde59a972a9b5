"""The files by which clusters start jobs: well-formed, complete, and with flags that exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindspeed_lora.config.commands import parse

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "examples" / "kubernetes"

POD: dict[str, Any] = {
    "restartPolicy?": str,
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int},
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "resources": {"limits": dict},
            "securityContext": {"readOnlyRootFilesystem": bool, "allowPrivilegeEscalation": bool},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str}],
}
REPLICA = {"replicas": int, "restartPolicy": str, "template": {"spec": POD}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "PyTorchJob": {
        "apiVersion": "kubeflow.org/v1",
        "metadata": {"name": str},
        "spec": {"nprocPerNode": str, "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA}},
    },
    "Job": {
        "apiVersion": "batch/v1",
        "metadata": {"name": str},
        "spec": {
            "completionMode": "Indexed",
            "completions": int,
            "parallelism": int,
            "template": {"spec": {**POD, "subdomain": str}},
        },
    },
    "Service": {
        "apiVersion": "v1",
        "metadata": {"name": str},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": bool, "selector": dict},
    },
}


def check(found: Any, schema: Any, path: str) -> None:
    """Every key of the schema is there, with its type, or the very value."""
    if isinstance(schema, dict):
        assert isinstance(found, dict), path
        for key, part in schema.items():
            if not key.endswith("?"):
                assert key in found, f"{path}.{key}"
            if key.rstrip("?") in found:
                check(found[key.rstrip("?")], part, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(found, list) and found, path
        for number, part in enumerate(found):
            check(part, schema[0], f"{path}[{number}]")
    elif isinstance(schema, type):
        assert isinstance(found, schema), f"{path}: {found!r}"
    else:
        assert found == schema, f"{path}: {found!r}"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    if document["kind"] == "PyTorchJob":
        return [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]
    return [spec["template"]["spec"]] if document["kind"] == "Job" else []


@pytest.mark.parametrize("name", sorted(path.name for path in KUBERNETES.glob("*.yaml")))
def test_kubernetes(name: str) -> None:
    for document in documents(name):
        check(document, SCHEMAS[document["kind"]], document["kind"])
        for pod in pods(document):
            (container,) = pod["containers"]
            args = container["args"]
            words = args[args.index("/app/posttrain_gpt.py") + 1 :]
            job = parse("posttrain", words, {"WORLD_SIZE": "32"})
            assert job.checkpoint.sigterm_grace_seconds == pod["terminationGracePeriodSeconds"]
            assert job.checkpoint.resume == "auto", "a pod that starts anew has no restart count"
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert "/scratch" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_jobs_parts_know_each_other() -> None:
    service, job = documents("indexed_job.yaml")
    name = job["metadata"]["name"]
    spec = job["spec"]
    args = spec["template"]["spec"]["containers"][0]["args"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert f"--master-addr={name}-0.{service['metadata']['name']}" in args
    assert spec["completions"] == spec["parallelism"] and f"--nnodes={spec['completions']}" in args
    (operator,) = documents("pytorchjob.yaml")
    for pod in pods(operator):
        assert pod["containers"][0]["name"] == "pytorch", "the operator looks for it"


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "slurm").glob("*.sbatch")), ids=lambda p: p.name)
def test_slurm(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, flags=re.MULTILINE)
    assert {"nodes", "requeue", "signal", "time", "gpus-per-node"} <= set(directives)
    first_command = text.index("\nset -euo pipefail")
    assert text.rindex("#SBATCH") < first_command, "directives after a command are not read"
    grace = re.search(r"--signal=TERM@(\d+)", text)
    assert grace is not None and f"--sigterm-grace-seconds {grace.group(1)}" in text


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "slurm").glob("*.sbatch")), ids=lambda p: p.name)
def test_slurm_starts_tasks_with_their_cores(path: Path, tmp_path: Path) -> None:
    """With many nodes, whose names scontrol goes on to write when the first is known, and blanks in paths."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "scontrol").write_text("#!/bin/bash\nseq -f node%.0f 1 50000\n")
    (stubs / "srun").write_text('#!/bin/bash\necho "cores ${SRUN_CPUS_PER_TASK-none}"\nprintf "%s\\n" "$@"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    environment = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": "/a b",
        "SLURM_JOB_NODELIST": "node[1-50000]",
        "SLURM_JOB_NUM_NODES": "50000",
        "SLURM_JOB_ID": "7",
    }
    for cores in ({"SLURM_CPUS_PER_TASK": "48"}, {}):
        done = subprocess.run(
            ["bash", str(path), "--save", "c d"], env={**environment, **cores}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told, *words = done.stdout.splitlines()
        assert told == f"cores {cores.get('SLURM_CPUS_PER_TASK', 'none')}"
        assert "/a b/posttrain_gpt.py" in words and words[-2:] == ["--save", "c d"]
        if path.name == "torchrun.sbatch":
            assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles(name: str) -> None:
    """Not root, everything that writes is sent to /scratch, and what is copied is there."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / name).read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "ARG", "WORKDIR", "ENV", "RUN", "COPY", "USER", "ENTRYPOINT"}
    assert {line.split()[0] for line in lines} <= known
    last = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 1000:1000" in last
    environment = " ".join(line for line in last if line.startswith("ENV"))
    for variable in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        assert f" {variable}=/scratch" in environment
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert list(ROOT.glob(source)), source
                assert f"!{source.removeprefix('./')}" in ignored, source
    bounds = re.search(r'"torch(>=[\d.]+,<[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert bounds is not None and f'"torch{bounds.group(1)}"' in text
