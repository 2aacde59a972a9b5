"""However a weight is cut, its shards hold the numbers of the whole matrices, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.quantization.matrix import QuantizedMatrix, dequantize, quantize
from mindspeed_lora.quantization.runs import Piece
from mindspeed_lora.quantization.shard import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_matrix(
    rows: int, columns: int, settings: QuantSettings, seed: int = 0, dtype: torch.dtype = torch.float32
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (
        0.5 + torch.rand(rows, 1, generator=generator)
    )
    return quantize(weight.to(dtype), settings, "weight")


def expected_of(
    matrices: Sequence[QuantizedMatrix], pieces: Sequence[Piece], dtype: torch.dtype
) -> torch.Tensor:
    whole = [dequantize(matrix, dtype) for matrix in matrices]
    return torch.cat([whole[p.matrix][slice(*p.rows), slice(*p.columns)] for p in pieces])


def check(
    matrices: Sequence[QuantizedMatrix], pieces: Sequence[Piece], dtype: torch.dtype
) -> QuantizedWeight:
    """All rows, and some, of the shard of ``pieces``; then the shard."""
    expected = expected_of(matrices, pieces, dtype)
    shard = QuantizedWeight.from_matrices(iter(matrices), pieces, expected.shape, dtype)
    found = shard.dense()
    assert found.dtype == dtype and torch.equal(found, expected)
    for some in (slice(0, 1), slice(1, None), slice(len(expected) // 3, len(expected) // 2 + 1), slice(2, 2)):
        assert torch.equal(shard.dense(some), expected[some])
    return shard


@st.composite
def cuts(draw: st.DrawFn) -> tuple[QuantSettings, list[tuple[int, int]], list[Piece]]:
    """Settings, shapes of matrices that are equally wide or not, and pieces of them of one width."""
    settings = QuantSettings(
        draw(st.sampled_from(["nf4", "fp4", "int8"])),
        draw(st.sampled_from([32, 64, 128])),
        draw(st.booleans()),
    )
    unit = draw(st.sampled_from([1, 1, 2, 16, 64]))
    local = draw(st.integers(1, 6)) * unit
    shapes = [
        (draw(st.integers(1, 20)), local + draw(st.sampled_from([0, 0, 1, 2])) * unit)
        for _ in range(draw(st.integers(1, 3)))
    ]
    pieces = []
    for _ in range(draw(st.integers(1, 5))):
        matrix = draw(st.integers(0, len(shapes) - 1))
        rows, width = shapes[matrix]
        first = draw(st.integers(0, rows - 1))
        column = draw(st.integers(0, (width - local) // unit)) * unit
        pieces.append(Piece(matrix, (first, draw(st.integers(first + 1, rows))), (column, column + local)))
    return settings, shapes, pieces


@settings(max_examples=300, deadline=None)
@given(cuts(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 1000))
def test_random_pieces(case, quantized, compute, seed):
    settings, shapes, pieces = case
    matrices = [random_matrix(*shape, settings, seed + i, quantized) for i, shape in enumerate(shapes)]
    check(matrices, pieces, compute)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_of_a_layer(kind, tp):
    """Fused q/k/v (grouped queries), gate above up, and row-cut linears over TP, nested statistics."""
    settings = QuantSettings(kind, 64, True)
    heads, groups, head, hidden, ffn = 16, 8, 24, 320, 416
    query, *others = (
        random_matrix(rows * head, hidden, settings, i) for i, rows in enumerate([heads, groups, groups])
    )
    gate, up = random_matrix(ffn, hidden, settings, 3), random_matrix(ffn, hidden, settings, 4)
    proj, down = random_matrix(hidden, heads * head, settings, 5), random_matrix(hidden, ffn, settings, 6)
    for rank in range(tp):
        fused = []
        for group in range(rank * groups // tp, (rank + 1) * groups // tp):
            of_group = heads // groups * head
            fused.append(Piece(0, (group * of_group, (group + 1) * of_group), (0, hidden)))
            fused += [Piece(matrix, (group * head, (group + 1) * head), (0, hidden)) for matrix in (1, 2)]
        check([query, *others], fused, torch.float32)
        rows = (rank * ffn // tp, (rank + 1) * ffn // tp)
        check([gate, up], [Piece(0, rows, (0, hidden)), Piece(1, rows, (0, hidden))], torch.bfloat16)
        for matrix in (proj, down):
            width = matrix.shape[1] // tp
            check([matrix], [Piece(0, (0, hidden), (rank * width, (rank + 1) * width))], torch.float32)


@pytest.mark.parametrize("columns", [(0, 192), (64, 128), (7, 100)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stacks_of_experts(kind, columns):
    """``[e, out, in]``, also where an expert's numbers do not end between bytes."""
    settings = QuantSettings(kind, 64, True)
    matrices = [random_matrix(21, 192, settings, seed) for seed in range(6)]
    pieces = [Piece(i // 2, rows, columns) for i, rows in enumerate([(0, 4), (9, 18)] * 3)]
    expected = expected_of(matrices, pieces, torch.float32).view(3, 13, -1)
    shard = QuantizedWeight.from_matrices(iter(matrices[:3]), pieces, expected.shape, torch.float32)
    assert (shard.dim(), shard.size(0), shard.numel()) == (3, 3, expected.numel())
    assert torch.equal(shard.dense(), expected)
    assert torch.equal(shard.dense(slice(2, 11)), expected[:, 2:11])
    for index in range(3):
        one = shard.expert(index)
        assert one.codes.data_ptr() == shard.codes.data_ptr() and one.shape == expected.shape[1:]
        assert torch.equal(one.dense(), expected[index])
        assert torch.equal(one.dense(slice(3, 7)), expected[index, 3:7])


def test_matrices_are_asked_for_one_at_a_time():
    asked = []

    def matrices():
        for index in range(3):
            asked.append(index)
            yield random_matrix(4, 64, QuantSettings("nf4"), index)

    pieces = [Piece(index, (0, 4), (0, 64)) for index in (2, 0, 1)]
    shard = QuantizedWeight.from_matrices(matrices(), pieces, (12, 64), torch.float32)
    assert asked == [0, 1, 2]
    assert torch.equal(
        shard.dense(slice(0, 4)), dequantize(random_matrix(4, 64, QuantSettings("nf4"), 2), torch.float32)
    )


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 1024), (1024, 2048), (576, 1536)])
def test_bits_of_a_weight(rows, columns, tp):
    """At most 4.2 with nested statistics, whichever way it is cut."""
    matrix = random_matrix(rows, columns, QuantSettings("nf4", 64, True))
    by_rows = Piece(0, (0, rows // tp), (0, columns))
    by_columns = Piece(0, (0, rows), (0, columns // tp))
    for piece in (by_rows, by_columns):
        if piece.columns[1] % 64:
            continue
        shape = (piece.rows[1], piece.columns[1])
        shard = QuantizedWeight.from_matrices([matrix], [piece], shape, torch.bfloat16)
        assert shard.nbytes * 8 / shard.numel() <= 4.2


@pytest.mark.parametrize("columns", [(0, 192), (64, 128), (7, 100)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dequantising_waits_for_nothing_on_the_host(kind, columns):
    """On the meta device, where waiting is an error."""
    shape = (9, columns[1] - columns[0])
    matrix = random_matrix(10, 192, QuantSettings(kind, 64, True))
    shard = QuantizedWeight.from_matrices([matrix], [Piece(0, (1, 10), columns)], shape, torch.bfloat16).to(
        "meta"
    )
    assert shard.dense().is_meta and shard.dense(slice(2, 5)).shape == (3, shape[1])


def test_statistics_survive_a_change_of_dtype():
    shard = check([random_matrix(8, 64, QuantSettings("nf4"))], [Piece(0, (0, 8), (0, 64))], torch.float32)
    before = shard.dense()
    module = torch.nn.Sequential(shard).to(torch.bfloat16)
    assert torch.equal(shard.dense(), before) and not list(module.parameters()) and not module.state_dict()
