"""A dense Llama-like Hugging Face folder as a Mixtral one that computes the same function.

    python tools/upcycle.py --load-dir SmolLM2-135M-Instruct-padded --save-dir SmolLM2-4x135M [--num-experts 4]

Every expert is a copy of the layer's MLP (sparse upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055, section 2.1),
and the weights of a token's experts sum to one, so that the function is the dense model's up to rounding, whatever the
router chooses. The router is random and not zero: tokens spread unevenly over the experts, and none of them starves.
``--noise`` makes the experts differ. One tensor is read and written at a time; a killed run leaves no target.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.adapters.initial import generator_for
from mindspeed_lora.atomic import atomic_directory
from mindspeed_lora.checkpoint.canonical import EXPERTS, ROUTER
from mindspeed_lora.checkpoint.conversion.convert import check_space
from mindspeed_lora.checkpoint.conversion.progress import Progress
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.hf import read_config, shape_of
from mindspeed_lora.checkpoint.formats.hf_writer import plan_hf
from mindspeed_lora.checkpoint.formats.mcore import check_same_shape
from mindspeed_lora.checkpoint.formats.model_files import copy_model_files, write_json
from mindspeed_lora.checkpoint.source import CheckpointSource, Source, open_source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused, UserError
from mindspeed_lora.models.families.segments import Range

_EXPERT = re.compile(rf"(.+\.){re.escape(EXPERTS)}\.\d+\.(linear_fc[12]\.weight)")
_LLAMA_ONLY = ("mlp_bias", "attention_bias", "pretraining_tp", "layer_types", "auto_map")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is made of a dense model."""

    num_experts: int = 4
    topk: int = 2
    router_scale: float = 1.0
    """Standard deviation of the router's logits where its input has the size that the norm before it gives."""
    noise: float = 0.0
    """Standard deviation of what is added to the experts, in multiples of their matrix's root mean square."""
    seed: int = 1
    """Of router and noise. With 1 every expert of SmolLM2 gets about 4% or more of its layer's choices."""

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.num_experts:
            raise Refused(
                f"--moe-router-topk {self.topk} of --num-experts {self.num_experts}: expected between 1 and all of them"
            )
        if not (self.router_scale > 0 and self.noise >= 0):
            raise Refused(
                f"--router-scale {self.router_scale:g} and --noise {self.noise:g}: expected a positive number and one "
                "that is not negative"
            )


class UpcycledSource(CheckpointSource):
    """The canonical tensors of the model with experts, each made of the dense model's when it is asked for."""

    def __init__(self, dense: Source, shape: ModelShape, recipe: Recipe) -> None:
        super().__init__(dense.path, shape, None, dense.config_dir)
        self.dense, self.recipe = dense, recipe

    def dtype(self, name: str) -> torch.dtype:
        """The dense model's; a router has that of the norm before it."""
        return self.dense.dtype(self._origin(name))

    def _origin(self, name: str) -> str:
        """The dense model's tensor that one is made of."""
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            return f"{expert[1]}mlp.{expert[2]}"
        return name.replace(f"{ROUTER}.weight", "pre_mlp_layernorm.weight")

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        value = self.dense.read(self._origin(name))
        if ROUTER in name:
            value = self._router(name, value)
        elif self.recipe.noise and _EXPERT.fullmatch(name):
            value = (
                value
                + self._drawn(name, value.shape) * self.recipe.noise * value.float().square().mean().sqrt()
            )
        for axis, ranges in enumerate(wanted):
            value = torch.cat([value.narrow(axis, start, stop - start) for start, stop in ranges], axis)
        out.copy_(value)

    def _router(self, name: str, norm: torch.Tensor) -> torch.Tensor:
        """``[E, h]``: rows that a normalised vector times ``norm [h]`` meets with logits of the wanted size.

        RMSNorm gives vectors of about the length of its weight.
        """
        drawn = self._drawn(name, (self.recipe.num_experts, norm.numel()))
        return drawn * (self.recipe.router_scale / norm.float().norm().clamp_min(1e-6))

    def _drawn(self, name: str, size: Sequence[int]) -> torch.Tensor:
        return torch.randn(*size, generator=generator_for(self.recipe.seed, name))


def mixtral_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The config.json of the model with experts, from the dense one's."""
    kept = {key: value for key, value in config.items() if key not in _LLAMA_ONLY}
    kept.setdefault("sliding_window", None)
    # Where the file leaves these out, Mixtral's defaults are others than Llama's.
    kept.setdefault("rms_norm_eps", 1e-6)
    if not kept.get("rope_parameters"):
        kept.setdefault("rope_theta", 10000.0)
    return {
        **kept,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.topk,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def upcycle(dense: Path, target: Path, recipe: Recipe, *, overwrite: bool = False, workers: int = 2) -> None:
    """Write the Mixtral folder ``target`` of the dense folder ``dense``.

    Raises:
        Refused: the dense model is none that Mixtral's layers can compute, or the target is taken.
    """
    source = open_source(dense, "hf", flag="--load-dir")
    if dense.resolve().is_relative_to(target.resolve()):
        raise Refused(
            f"--load-dir {dense} lies in the folder to be written, {target}; choose another --save-dir"
        )
    with tempfile.TemporaryDirectory() as scratch:
        config_dir = Path(scratch)
        copy_model_files(dense, config_dir)
        write_json(config_dir / "config.json", mixtral_config(read_config(dense), recipe))
        upcycled = UpcycledSource(source, _shape(source, config_dir), recipe)
        plan, progress = plan_hf(upcycled, config_dir), Progress(upcycled)
        check_space(target, plan.num_bytes)
        with atomic_directory(target, overwrite) as folder:
            execute(plan, folder, workers, progress)
    progress.finish(target, plan.num_bytes)


def _shape(source: Source, config_dir: Path) -> ModelShape:
    """What the new config.json describes, which beside the experts must be what the dense model is."""
    dense, shape = source.shape, shape_of(config_dir)
    if dense.moe is not None:
        raise Refused(
            f"--load-dir {source.path}: a {dense.family} model has experts already; give a dense one"
        )
    as_dense = dataclasses.replace(shape, moe=None, family=dense.family, params_dtype=dense.params_dtype)
    check_same_shape(dense, as_dense, str(source.path), "a Mixtral model of it, which computes no other")
    return dataclasses.replace(shape, params_dtype=dense.params_dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Up-cycle one folder; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--load-dir", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--save-dir", type=Path, required=True, help="Mixtral folder to write")
    parser.add_argument("--num-experts", type=int, default=Recipe.num_experts, help="experts of a layer")
    parser.add_argument("--moe-router-topk", type=int, default=Recipe.topk, help="experts of a token")
    parser.add_argument("--router-scale", type=float, default=Recipe.router_scale, help="size of the logits")
    parser.add_argument("--noise", type=float, default=Recipe.noise, help="relative noise on the experts")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of router and noise")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    given = parser.parse_args(arguments)
    try:
        recipe = Recipe(
            num_experts=given.num_experts,
            topk=given.moe_router_topk,
            router_scale=given.router_scale,
            noise=given.noise,
            seed=given.seed,
        )
        upcycle(given.load_dir, given.save_dir, recipe, overwrite=given.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename or given.save_dir}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
