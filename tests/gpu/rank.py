"""What the tests let a process of either device compute; results come back as tensors of the CPU."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
VOCABULARY = 300


def cuda_device() -> str | None:
    """Name of the CUDA device that this process computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def drawn(*size: int, seed: int = 0) -> Tensor:
    """Normal numbers of the CPU's generator, so that both devices have the same."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def dropout_mask(p: float) -> Tensor:
    """Mask of 64 tokens and features 5 … 100 of an adapter's input."""
    from mindspeed_lora.adapters.dropout import keep_mask, stream_of, token_keys
    from mindspeed_lora.device import current_device

    samples = torch.arange(64) // 9
    keys = token_keys(1234, 7, samples, torch.arange(64)).to(current_device())
    return keep_mask(keys, stream_of("decoder.layers.3.mlp.linear_fc1.lora_a"), (5, 101), p).cpu()


def norm(dtype: torch.dtype) -> list[Tensor]:
    """RMSNorm of ``[7, 3, 64]``, and the gradients of its input and weight."""
    from types import SimpleNamespace
    from typing import Any

    from mindspeed_lora.device import current_device
    from mindspeed_lora.models.norm import RMSNorm

    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    module = RMSNorm(config, 64).to(current_device())
    with torch.no_grad():
        module.weight.copy_(1 + 0.2 * drawn(64, seed=1))
    x = drawn(7, 3, 64).to(current_device(), dtype).requires_grad_()
    output = module(x)
    grads = torch.autograd.grad(output, (x, module.weight), drawn(7, 3, 64, seed=2).to(x))
    return [tensor.detach().float().cpu() for tensor in (output, *grads)]


def vocabulary_loss(dtype: torch.dtype) -> list[Tensor]:
    """Loss of 50 positions, half of them with a label, and the gradients of hidden states and weight."""
    from mindspeed_lora.config.parallel import ParallelConfig
    from mindspeed_lora.device import current_device
    from mindspeed_lora.models.vocab_loss import vocab_parallel_loss
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups

    groups, _ = initialize_groups(ParallelConfig(), seed=1)
    try:
        device = current_device()
        hidden = drawn(50, 32).to(device, dtype).requires_grad_()
        weight = (0.3 * drawn(VOCABULARY + 20, 32, seed=1)).to(device, dtype).requires_grad_()
        labels = torch.where(torch.arange(50) % 2 == 0, torch.arange(50) * 5, -100)
        loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
        grads = torch.autograd.grad(loss, (hidden, weight))
        return [tensor.detach().float().cpu() for tensor in (loss, *grads)]
    finally:
        destroy_groups()


def dequantized(kind: str, columns: tuple[int, int]) -> list[Tensor]:
    """Rows 32 … 95 of a matrix ``[96, 192]``, all of them and some, by quantised and by compute dtype."""
    from mindspeed_lora.config.quantization import QuantSettings
    from mindspeed_lora.device import current_device
    from mindspeed_lora.quantization.matrix import quantize
    from mindspeed_lora.quantization.runs import Piece
    from mindspeed_lora.quantization.shard import QuantizedWeight

    found = []
    for quantized in (torch.float32, torch.bfloat16):
        matrix = quantize(drawn(96, 192).to(quantized), QuantSettings(kind, 64, True), "weight")
        shape = (64, columns[1] - columns[0])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = QuantizedWeight.from_matrices([matrix], [Piece(0, (32, 96), columns)], shape, dtype)
            weight.to(current_device())
            found += [weight.dense().cpu(), weight.dense(slice(3, 17)).cpu()]
    return found


def quantized_products() -> list[Tensor]:
    """``x Wᵀ`` and ``g W`` of 64 tokens with a matrix ``[256, 512]``."""
    from mindspeed_lora.config.quantization import QuantSettings
    from mindspeed_lora.device import current_device
    from mindspeed_lora.quantization.matrix import quantize
    from mindspeed_lora.quantization.product import input_product, product
    from mindspeed_lora.quantization.runs import Piece
    from mindspeed_lora.quantization.shard import QuantizedWeight

    matrix = quantize(drawn(256, 512), QuantSettings("nf4", 64, True), "weight")
    pieces = [Piece(0, (0, 256), (0, 512))]
    weight = QuantizedWeight.from_matrices([matrix], pieces, (256, 512), torch.float32).to(current_device())
    x, grad = (drawn(64, width, seed=width).to(current_device()) for width in (512, 256))
    y, grad_x = x.new_empty(64, 256), x.new_empty(64, 512)
    product(x, weight, y)
    input_product(grad, weight, grad_x)
    return [y.cpu(), grad_x.cpu()]


def attention(
    dtype: torch.dtype, sub_rows: tuple[tuple[int, ...], ...] | None, window: int | None
) -> list[Tensor]:
    """Core attention of two rows of 32 positions, and the gradients of query, key and value."""
    from mindspeed_lora.device import current_device
    from mindspeed_lora.device.attention import rows_at_once
    from mindspeed_lora.models.attention_tiles import attention_tiles
    from mindspeed_lora.models.tiled_attention import tiled_attention

    chunks = ((0, 32),)
    tensors = [drawn(32, 2, heads, 64, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    operands = [t.bfloat16().to(current_device(), dtype).requires_grad_() for t in tensors]
    query, key, value = operands
    out = rows_at_once(query, key, value, sub_rows, window, 0.1)
    if out is None:
        tiles = attention_tiles(2, sub_rows, chunks, chunks, window)
        out = tiled_attention(query, key, value, tiles, 0.1).view_as(query)
    grads = torch.autograd.grad(out, operands, drawn(32, 2, 6, 64, seed=9).to(out))
    return [tensor.detach().float().cpu() for tensor in (out, *grads)]


def world_of_one() -> tuple[str, str, str, list[float]]:
    """Backends of data and of control, device type, and what a few collectives leave of 1, 2, 3."""
    import torch.distributed as dist

    from mindspeed_lora.config.parallel import ParallelConfig
    from mindspeed_lora.device import current_device
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups

    groups, _ = initialize_groups(ParallelConfig(), seed=1)
    try:
        values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=current_device())
        # Straight to the backend: the package's own collectives do nothing in a world of one.
        dist.all_reduce(values, group=groups.dp_cp_group)
        dist.broadcast(values, src=0, group=groups.model_group)
        whole = torch.empty_like(values)
        dist.all_gather_into_tensor(whole, values, group=groups.tp_group)
        part = torch.empty_like(whole)
        dist.reduce_scatter_tensor(part, whole, group=groups.tp_group)
        told = [None]
        dist.all_gather_object(told, "here", group=groups.control_group)
        assert told == ["here"]
        backends = dist.get_backend(groups.tp_group), dist.get_backend(groups.control_group)
        return *backends, part.device.type, part.tolist()
    finally:
        destroy_groups()


def grouped_lora(dtype: torch.dtype) -> list[Tensor]:
    """Grouped linear with gate and up adapted apart, of ranks and rows that fill no 16 bytes, one expert idle."""
    from mindspeed_lora.adapters.grouped import GroupedLora, GroupedLoraPart
    from mindspeed_lora.adapters.side_branch import RowBlock
    from mindspeed_lora.device import current_device
    from mindspeed_lora.models.moe.experts import GroupedLinear

    device = current_device()
    base = GroupedLinear(3, 24, 32, dtype).to(device).requires_grad_(False)
    blocks = RowBlock(0, 12), RowBlock(12, 24)
    parts = [
        GroupedLoraPart(r, 3, 32, rows, 0.5, dtype, device) for r, rows in zip((3, 8), blocks, strict=True)
    ]
    layer = GroupedLora(base, parts, 0.0, column=True)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    x = drawn(50, 32, seed=20).to(device, dtype).requires_grad_()
    output = layer(x, torch.tensor([17, 17, 50], dtype=torch.int32, device=device))
    output.backward(drawn(50, 24, seed=21).to(device, dtype))
    trained = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    grads = [tensor.grad for tensor in trained if tensor.grad is not None]
    assert len(grads) == 5
    return [tensor.float().cpu() for tensor in (output.detach(), *grads)]
