"""A micro-batch on the meta device: what stays on another device, or waits for a value, fails there.

The meta device stands for CUDA: a tensor made on the CPU cannot be mixed with it, and ``.item()``, ``.tolist()`` and
``.nonzero()``, for which the host would wait, have no answer on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.device import attention
from mindspeed_lora.device.attention import flash_backward, flash_forward, rows_at_once
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.gpt import GPTModel
from tests.support.adapters import new_adapter
from tests.support.models import make_model
from tests.unit.models.conftest import BuildGpt

META = torch.device("meta")
SUB_ROWS = ((5, 11), (16,))


def on_meta(model: GPTModel) -> GPTModel:
    """The model with parameters on the meta device; what it holds besides stays where it is."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = torch.nn.Parameter(parameter.to(META), requires_grad=parameter.requires_grad)
            setattr(module, name, moved)
    return model


def train(model: GPTModel, sub_rows: tuple[tuple[int, ...], ...] | None) -> None:
    samples = torch.arange(2).unsqueeze(0).expand(16, 2)
    positions = torch.arange(16)
    keys = token_keys(1, 1, samples, positions.unsqueeze(1).expand(16, 2)).to(META)
    labels = torch.full((2, 16), -100)
    labels[:, 3:9] = 7
    tokens = torch.empty(2, 16, dtype=torch.int64, device=META)
    loss = model(tokens, labels, positions.to(META), context=ForwardContext(sub_rows, keys))
    assert loss.device == META
    loss.backward()


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("sub_rows", [None, SUB_ROWS], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["llama-bias", "mistral-window", "qwen3"])
def test_a_training_pass_stays_on_its_device_and_waits_for_nothing(
    build_gpt: BuildGpt,
    tmp_path: Path,
    name: str,
    sub_rows: tuple[tuple[int, ...], ...] | None,
    recompute: str | None,
) -> None:
    folder = make_model(name, tmp_path / name)
    adapter = new_adapter(shape_of(folder), lora_dropout=0.1)
    model = on_meta(build_gpt(folder, adapter, recompute_granularity=recompute)).train()
    train(model, sub_rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and p.grad.device == META for p in trained)


@pytest.mark.parametrize(
    "breakage",
    [lambda x: x * torch.ones(x.size(-1)), lambda x: x * x.sum().item()],
    ids=["tensor of the CPU", "waits"],
)
def test_such_a_mistake_is_found(
    build_gpt: BuildGpt, tmp_path: Path, breakage: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = make_model("llama", tmp_path / "llama")
    model = on_meta(build_gpt(folder, new_adapter(shape_of(folder))))
    final = model.decoder.final_layernorm
    final.register_forward_hook(lambda _module, _inputs, output: breakage(output))
    with pytest.raises((RuntimeError, NotImplementedError)):
        train(model.train(), None)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sub_rows", [None, SUB_ROWS], ids=["rows", "packed"])
def test_cuda_attention_of_all_rows(
    sub_rows: tuple[tuple[int, ...], ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shape rules of torch's CUDA kernels, which need no device."""
    monkeypatch.setattr(attention, "_bounds", attention._bounds.__wrapped__)  # a fake tensor must not be kept
    with FakeTensorMode(), torch.no_grad():
        query, key = (torch.empty(16, 2, heads, 16, dtype=torch.bfloat16, device="cuda") for heads in (6, 2))
        out = rows_at_once(query, key, key, sub_rows, window, 0.3)
        assert out is not None and out.shape == query.shape and out.is_cuda
        narrow = torch.empty(16, 2, 6, 12, dtype=torch.bfloat16, device="cuda")
        assert window is None or rows_at_once(narrow, narrow, narrow, sub_rows, window, 0.3) is None


def test_cuda_attention_of_a_tile() -> None:
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 6, 16, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 2, 16, 8, dtype=torch.bfloat16, device="cuda")
        out, lse = flash_forward(query, key, key, True, None, 0.3)
        assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 6, 16), torch.float32)
        grads = flash_backward(out, (query, key, key), out, lse, True, None, 0.3)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
