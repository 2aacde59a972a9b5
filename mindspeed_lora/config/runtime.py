"""What a command does with its configuration instead of, or beside, its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Check, Section, flag
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused

_NNODES = Check(
    "a number of nodes, or torchrun's MIN:MAX", lambda text: all(n.isdigit() for n in text.split(":"))
)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """Switches of every command."""

    config: str | None = flag("YAML file with flags as keys; the command line wins", metavar="FILE.yaml")
    print_config: bool = flag("print the resolved configuration as YAML and leave", False)
    debug: bool = flag("print the traceback of an error", False)
    family_file: str | None = flag(
        "a model family described in JSON or YAML, beside the ones that are known", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class FileRuntimeConfig(RuntimeConfig):
    """Switches of the commands that write files in one process."""

    dry_run: bool = flag("check everything, tell what would be written, write nothing", False)


@dataclass(frozen=True, kw_only=True)
class LaunchedRuntimeConfig(RuntimeConfig):
    """Switches of the commands that torchrun starts."""

    dry_run: bool = flag("check everything, tell what would happen, write nothing", False)
    world_size: int | None = flag("number of processes that --dry-run plans for", check=AT_LEAST_ONE)
    dry_run_device: str | None = flag(
        "device that --dry-run tells memory and dtype for; left out: this machine's", choices=("cpu", "cuda")
    )
    nnodes: str | None = flag("torchrun's; tells --dry-run the number of nodes", check=_NNODES)
    nproc_per_node: int | None = flag(
        "torchrun's; tells --dry-run the processes a node",
        names=("--nproc_per_node", "--nproc-per-node"),
        check=AT_LEAST_ONE,
    )

    def resolve_world_size(self, parallel: ParallelConfig, environ: Mapping[str, str]) -> int:
        """Processes of the run: the launcher's; of a dry run as told, else the fewest that fit."""
        if self.dry_run and self.world_size is not None:
            return self.world_size
        if "WORLD_SIZE" in environ:
            return self._launched(int(environ["WORLD_SIZE"]))
        if not self.dry_run:
            return self._launched(1)
        if self.nproc_per_node is not None:
            return int((self.nnodes or "1").split(":")[-1]) * self.nproc_per_node
        return parallel.model_parallel_size * parallel.context_parallel_size

    def _launched(self, world_size: int) -> int:
        if self.world_size not in (None, world_size):
            raise Refused(
                f"--world-size {self.world_size}: the world has {world_size}; start as many processes with "
                "torchrun, or add --dry-run to plan for another number"
            )
        return world_size
