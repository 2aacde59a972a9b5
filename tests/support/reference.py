"""The reference of every parity test: transformers (and PEFT) in one process, fp32, row by row.

Nothing of the package is used here but the adapters' dropout masks, which PEFT would draw otherwise. Rows go
through the model one at a time, unpadded, so that neither padding nor micro-batches enter; the loss of a step is the
sum over its rows' tokens by the number of these tokens. Gradients come back under canonical names,
fused as Megatron-core fuses them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.adapters.dropout import keep_mask, kept_share, stream_of, token_keys
from tests.support.expert_factors import expert_factors, experts_of, split_weight
from tests.support.quantized import Quant, library_matrices, load_quantized
from tests.support.rows import IGNORED, Row
from tests.support.shards import Tensors

FUSED = {
    "self_attn.q_proj": "linear_qkv",
    "self_attn.k_proj": "linear_qkv",
    "self_attn.v_proj": "linear_qkv",
    "self_attn.qkv_proj": "linear_qkv",
    "self_attn.o_proj": "linear_proj",
    "self_attn.q_a_proj": "linear_q_down_proj",
    "self_attn.q_b_proj": "linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "linear_kv_down_proj",
    "self_attn.kv_b_proj": "linear_kv_up_proj",
    "mlp.gate_proj": "linear_fc1",
    "mlp.up_proj": "linear_fc1",
    "mlp.gate_up_proj": "linear_fc1",
    "mlp.down_proj": "linear_fc2",
    **{
        f"mlp.{name}.{linear}": f"shared_experts.{fused}"
        for name in ("shared_expert", "shared_experts")
        for linear, fused in (
            ("gate_proj", "linear_fc1"),
            ("up_proj", "linear_fc1"),
            ("down_proj", "linear_fc2"),
        )
    },
}
"""Linear of a transformers layer → Megatron's linear that holds it; Phi-3 packs some of them."""
DEFAULT_SEED = 1234
"""Of ``--seed``."""
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both sides train with."""

    steps: int = 5
    """Past the warm-up, with clipping and a falling learning rate."""
    global_batch_size: int = 4
    lr: float = 2e-3
    min_lr: float = 1e-4
    warmup_iters: int = 3
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Below the norms of most steps, so that clipping is active; 0 for none."""
    adam_eps: float = 1e-6
    """With Megatron's 1e-8 Adam turns the rounding noise of near-zero gradients into whole steps."""
    dropout: float = 0.0
    """Of the adapter's input, by our masks."""
    micro_batch_mean: int | None = None
    """Rows of a micro-batch where the loss is the mean of micro-batch means."""

    @property
    def flags(self) -> list[str]:
        """The command-line flags."""
        pairs = {
            "--train-iters": self.steps,
            "--global-batch-size": self.global_batch_size,
            "--lr": self.lr,
            "--min-lr": self.min_lr,
            "--lr-warmup-iters": self.warmup_iters,
            "--weight-decay": self.weight_decay,
            "--clip-grad": self.clip_grad,
            "--adam-eps": self.adam_eps,
            **({"--lora-dropout": self.dropout} if self.dropout else {}),
        }
        return [word for flag, value in pairs.items() for word in (flag, f"{value}")]

    def learning_rate(self, steps_done: int) -> float:
        """Megatron's linear warm-up from 0 and cosine decay."""
        if self.warmup_iters and steps_done <= self.warmup_iters:
            return self.lr * steps_done / self.warmup_iters
        share = (steps_done - self.warmup_iters) / (self.steps - self.warmup_iters)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class ReferenceRecord:
    """What the reference tells."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: Tensors = field(default_factory=dict)
    """Of the first step, by canonical name."""
    end: Tensors = field(default_factory=dict)
    """Trained parameters after the last step, by canonical name."""
    start_logits: list[torch.Tensor] = field(default_factory=list)
    """``[s, v]`` of each probe row."""
    end_logits: list[torch.Tensor] = field(default_factory=list)


class Reference:
    """A model of transformers, with or without a PEFT adapter.

    The A of a fused linear are tied, as Megatron's are; an adapter of :meth:`add_peft_adapter` has PEFT's own.
    """

    def __init__(
        self, model_folder: Path, dtype: torch.dtype = torch.float32, quant: Quant | None = None
    ) -> None:
        from transformers import AutoModelForCausalLM

        if quant is None:
            self.base: Any = AutoModelForCausalLM.from_pretrained(
                model_folder, dtype=dtype, attn_implementation="eager"
            )
        else:
            self.base = load_quantized(model_folder, quant, dtype)
        self.model: Any = self.base
        self.config = self.base.config
        self.tied = True
        linears = {name for layer in self.base.model.layers for name, _ in layer.named_modules()}
        self.fused = {name: linear for name, linear in FUSED.items() if name in linears}
        self.targets: tuple[str, ...] = LINEARS
        """Megatron's names of all linears, in a model without experts of a type that has them those of attention."""
        if "self_attn.kv_b_proj" in linears:
            if "self_attn.q_proj" in linears:
                self.fused["self_attn.q_proj"] = "linear_q_proj"
            # PEFT takes the names of the MLP's linears for the experts'.
            others = LINEARS[2:] if experts_of(self.base, LINEARS) else ()
            self.targets = (*(one for name, one in self.fused.items() if "attn" in name), *others)

    def resize(self, vocab_size: int, value: float | None = None) -> None:
        """More words, their rows random or of one value."""
        before = self.config.vocab_size
        self.base.resize_token_embeddings(vocab_size, mean_resizing=False)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in (self.base.model.embed_tokens, self.base.lm_head):
                new = module.weight[before:]
                new.copy_(torch.randn(new.shape, generator=generator) * 0.3)
                if value is not None:
                    new.fill_(value)

    def add_adapter(
        self, rank: int, alpha: int, targets: Sequence[str] | None = None, seed: int = 11
    ) -> None:
        """A new adapter with random A and B: with B = 0 the gradients of A would be zero."""
        from peft import LoraConfig, get_peft_model

        wanted = self.targets if targets is None else targets
        names = [
            name.rpartition(".")[2]
            for name, linear in self.fused.items()
            if linear.rpartition(".")[2] in wanted
        ]
        experts = experts_of(self.base, wanted)
        # Names like gate_proj would be read as an older form's of the experts, and make adapters of twice the rank.
        expression = rf".*\.(self_attn|mlp|shared_experts?)\.({'|'.join(names)})"
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=names if experts is None else expression,
            target_parameters=experts,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with _peft_quiet():
            self.model = get_peft_model(self.base, config)
        self._tie()
        self._draw(seed)

    def add_peft_adapter(self, seed: int = 11, **config: Any) -> None:
        """A new adapter as these keywords of PEFT's ``LoraConfig`` say, with random A and B."""
        from peft import LoraConfig, get_peft_model

        with _peft_quiet():
            self.model = get_peft_model(self.base, LoraConfig(task_type="CAUSAL_LM", **config))
        self.tied = False
        self._draw(seed)

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self._trained():
                if "lora_" not in name:
                    continue
                scale = 0.1 if "lora_B" in name else parameter.size(1) ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def load_adapter(self, folder: Path, tied: bool = True) -> None:
        """An adapter from a PEFT folder."""
        from peft import PeftModel

        with _peft_quiet():
            self.model = PeftModel.from_pretrained(self.base, folder, is_trainable=True)
        self.tied = tied
        if tied:
            self._tie()

    def merge_adapter(self) -> None:
        """The adapter merged into the model's weights by PEFT."""
        self.model = self.model.merge_and_unload()

    def save_adapter(self, folder: Path) -> Path:
        """Writes the adapter as PEFT does."""
        self.model.save_pretrained(folder)
        return folder

    def logits(self, row: Sequence[int]) -> torch.Tensor:
        """Logits ``[s, v]`` of one row."""
        self.model.eval()
        with torch.no_grad():
            out: torch.Tensor = self.model(torch.tensor([row])).logits[0]
        return out

    def loss(self, rows: Sequence[Row]) -> float:
        """Mean loss per loss-carrying token of all rows."""
        self.model.eval()
        with torch.no_grad():
            total = sum(self._row_loss(row).item() for row in rows)
        return total / sum(row.loss_weight for row in rows)

    def train(
        self, rows: Sequence[Row], recipe: Recipe, probe: Sequence[Sequence[int]] = ()
    ) -> ReferenceRecord:
        """Trains on the rows in their order, around and around."""
        record = ReferenceRecord(start_logits=[self.logits(row) for row in probe])
        self.model.train()
        if recipe.dropout:
            self.drop(recipe.dropout, DEFAULT_SEED)
        parameters: list[Any] = [parameter for _, parameter in self._trained()]
        adamw = self._optimizer(recipe)
        size = recipe.global_batch_size
        for step in range(recipe.steps):
            batch = [(step * size + i, rows[(step * size + i) % len(rows)]) for i in range(size)]
            record.losses.append(self._backward(batch, recipe, step + 1))
            norm = float(torch.stack([p.grad.double().norm() for p in parameters]).norm())
            record.grad_norms.append(norm)
            if step == 0:
                names = [name for name, _ in self._trained()]
                record.gradients = self._canonical(
                    {name: p.grad for name, p in zip(names, parameters, strict=True)}, torch.zeros_like
                )
            coefficient = min(1.0, recipe.clip_grad / (norm + 1e-6)) if recipe.clip_grad else 1.0
            for parameter in parameters:
                parameter.grad.mul_(coefficient)
            for group in adamw.param_groups:
                group["lr"] = recipe.learning_rate(step)
            adamw.step()
            adamw.zero_grad(set_to_none=False)
        record.end = self._canonical({name: p.detach() for name, p in self._trained()}, torch.Tensor.detach)
        record.end_logits = [self.logits(row) for row in probe]
        return record

    def _backward(self, batch: Sequence[tuple[int, Row]], recipe: Recipe, step: int) -> float:
        """Loss of a global batch of numbered rows; leaves its gradient."""
        size = recipe.micro_batch_mean or len(batch)
        groups = [batch[first : first + size] for first in range(0, len(batch), size)]
        groups = [group for group in groups if any(row.num_loss_tokens for _, row in group)]
        total = 0.0
        for group in groups:
            weight = 1.0 / (len(groups) * sum(row.loss_weight for _, row in group))
            for number, row in group:
                self._set_masks(step, number, row)
                loss = self._row_loss(row) * weight
                loss.backward()
                total += loss.item()
        return total

    def drop(self, p: float, seed: int) -> None:
        """Dropout in the place of PEFT's own: our masks, which depend on step, row, position and factor alone."""
        for name, module in self.base.named_modules():
            if hasattr(module, "lora_dropout"):
                _, _, number, linear = name.split(".", 3)
                place = "self_attention" if "attn" in linear else "mlp"
                module_name = f"decoder.layers.{number}.{place}.{self.fused[linear]}"
                if not self.tied and self._parts(linear) != [linear]:
                    module_name += f".{linear.rpartition('.')[2]}"
                factor = f"{module_name}.lora_a"
                module.lora_dropout["default"] = MaskedDropout(p, seed, factor)

    def _set_masks(self, step: int, number: int, row: Row) -> None:
        for module in self.base.modules():
            if isinstance(module, MaskedDropout):
                module.token = step, number, len(row.input_ids)

    def _row_loss(self, row: Row) -> torch.Tensor:
        """Summed cross entropy of a row's loss-carrying tokens, each times its weight."""
        logits = self.model(torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        if row.weights is None:
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        return (losses * torch.tensor(row.weights[1:])).sum()

    def _optimizer(self, recipe: Recipe) -> torch.optim.AdamW:
        """AdamW with Megatron's rule: no weight decay on norms and biases."""
        trained = [parameter for _, parameter in self._trained()]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=recipe.lr, eps=recipe.adam_eps, foreach=False)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trained parameters, one that is tied only once."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _tie(self) -> None:
        """One A for q/k/v and one for gate/up: the contract's reference for a fused linear."""
        for layer in self.base.model.layers:
            for modules in (
                [getattr(layer.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")],
                *(
                    [getattr(mlp, name, None) for name in ("gate_proj", "up_proj")]
                    for mlp in (
                        layer.mlp,
                        *(getattr(layer.mlp, name, None) for name in ("shared_expert", "shared_experts")),
                    )
                ),
            ):
                first, *others = modules
                for module in others:
                    if first is not None and module is not None and hasattr(module, "lora_A"):
                        module.lora_A["default"].weight = first.lora_A["default"].weight

    def _canonical(self, tensors: Tensors, frozen: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        """The tensors by canonical names, fused. Tied copies of A stand once among them.

        ``frozen`` makes of a parameter what stands for it where only others of a fused tensor are trained.
        """
        by_name = {_plain(name): tensor.float() for name, tensor in tensors.items()}
        untrained = {_plain(name): frozen(p).float() for name, p in self.model.named_parameters()}
        canonical: Tensors = {}
        factors = expert_factors(self.base)
        for name, tensor in by_name.items():
            if name in factors:
                canonical.update(factors[name].split(tensor))
                continue
            weights = split_weight(name, tensor)
            if weights is not None:
                canonical.update(weights)
                continue
            if not name.startswith("model.layers."):
                canonical[_OUTSIDE[name]] = tensor.clone()
                continue
            _, _, number, rest = name.split(".", 3)
            linear, _, kind = rest.rpartition(".")
            if linear not in self.fused:
                canonical[f"decoder.layers.{number}.{_NORMS[rest]}"] = tensor.clone()
                continue
            place = "self_attention" if "attn" in linear else "mlp"
            module = f"decoder.layers.{number}.{place}.{self.fused[linear]}"
            if kind.startswith("lora_") and not self.tied and self._parts(linear) != [linear]:
                canonical[f"{module}.{linear.rpartition('.')[2]}.{kind}"] = tensor.clone()
                continue
            target = f"{module}.{kind}"
            if target not in canonical:
                canonical[target] = self._fuse(
                    {**untrained, **by_name}, f"model.layers.{number}.", linear, kind
                )
        return canonical

    def linears(self) -> Tensors:
        """Weights of all linears of the layers, fused, by canonical name; quantised ones as they are dequantised."""
        names = {f"{name}.weight": weight for name, weight in library_matrices(self.base).items()}
        return self._canonical(names, lambda parameter: torch.zeros(parameter.shape))

    def _parts(self, linear: str) -> list[str]:
        """The linears of transformers that are fused with this one."""
        return [name for name in self.fused if self.fused[name] == self.fused[linear]]

    def _fuse(self, by_name: Tensors, layer: str, linear: str, kind: str) -> torch.Tensor:
        parts = self._parts(linear)
        packed = linear == "self_attn.qkv_proj"
        if kind == "lora_a" or (len(parts) == 1 and not packed):
            return by_name[f"{layer}{linear}.{kind}"].clone()
        tensors = [by_name[f"{layer}{part}.{kind}"] for part in parts]
        if len(parts) == 2:
            return torch.cat(tensors)
        # Megatron's rows: per query group its query heads, its key head, its value head.
        groups = self.config.num_key_value_heads
        if packed:
            width = tensors[0].size(0) // (self.config.num_attention_heads + 2 * groups)
            rows = [self.config.num_attention_heads * width, groups * width, groups * width]
            tensors = list(tensors[0].split(rows))
        grouped = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tensors[0].shape[1:])


class MaskedDropout(torch.nn.Module):
    """Dropout of one row ``[1, s, in]`` by the mask of a factor."""

    def __init__(self, p: float, seed: int, factor: str) -> None:
        super().__init__()
        self.p, self.seed, self.factor = p, seed, factor
        self.token = 0, 0, 0
        """Step, number of the row in the run, and its length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is kept, divided by the share that is."""
        if not self.training:
            return x
        step, number, length = self.token
        places = torch.arange(length)
        keys = token_keys(self.seed, step, torch.full_like(places, number), places)
        mask = keep_mask(keys, stream_of(self.factor), (0, x.size(-1)), self.p)
        return x * mask / kept_share(self.p)


_OUTSIDE = {
    "model.embed_tokens.token_adapter.trainable_tokens_delta.default": "embedding.word_embeddings.token_rows",
    "lm_head.token_adapter.trainable_tokens_delta.default": "output_layer.token_rows",
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """Without what PEFT 0.21 says about the transformers 5 that it runs on, whatever is loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    name = name.removeprefix("base_model.model.")
    if ".mlp.experts." not in name:  # where one of two factors lies in the other's base
        name = name.replace(".base_layer.", ".")
    name = name.replace(".modules_to_save.default.", ".")
    return name.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")
