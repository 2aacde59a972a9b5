"""What a launcher tells a process by its environment, beside rank and world size."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from mindspeed_lora.errors import Failed

_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_FIRST_PORT, _PORTS = 20_000, 10_000


def restart_count(environ: Mapping[str, str]) -> int:
    """How often torchrun (``--max-restarts``) or Slurm (``--requeue``) has started this job anew."""
    return max(int(text) if (text := environ.get(name, "")).isdigit() else 0 for name in _RESTART_COUNTS)


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` where srun starts the ranks.

    That is where a step has several tasks and no torchrun has set ``RANK``: one task is one rank. What is set
    already stays. All jobs of a cluster may share a node, so the port depends on the job's number.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or not tasks.isdigit() or int(tasks) < 2 or "SLURM_PROCID" not in environ:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    number = re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "")) or "0"
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(_FIRST_PORT + int(number) % _PORTS),
    }
    for name, value in found.items():
        environ.setdefault(name, value)


def check_ranks(environ: Mapping[str, str]) -> None:
    """What a launcher, or a person in its place, has set can be a world of ranks.

    Raises:
        Failed: it cannot; not a refusal, which rank 0 alone would tell.
    """
    for name in ("RANK", "WORLD_SIZE"):
        if not environ.get(name, "0").isdigit():
            raise Failed(
                f"{name}={environ[name]} in the environment: expected a whole number; torchrun sets it"
            )
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if int(environ.get("RANK", "0")) >= max(1, world_size):
        raise Failed(
            f"RANK={environ['RANK']} in the environment, but WORLD_SIZE={world_size}: ranks count from 0 to "
            f"{world_size - 1}"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if world_size > 1 and missing:
        raise Failed(
            f"WORLD_SIZE={world_size} in the environment, but no {', no '.join(missing)}; start the processes with "
            "torchrun, or set all four for each"
        )


def first_node(nodes: str) -> str:
    """The first name of a list of Slurm's: ``gpu01`` of ``gpu[01-04,07],login1``."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", name.group()) if name else nodes


def node_number(environ: Mapping[str, str]) -> str | None:
    """The launcher's number of this node, where it tells one: torchrun's ``GROUP_RANK``, Slurm's ``SLURM_NODEID``."""
    for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"):
        if environ.get(name):
            return environ[name]
    return None


def has_launchers_store(environ: Mapping[str, str]) -> bool:
    """Whether the ranks meet in a store that torchrun keeps for them."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "RANK" in environ
