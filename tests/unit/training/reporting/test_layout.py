from __future__ import annotations

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.training.reporting import ParameterCounts, layout_rows
from mindspeed_lora.training.reporting.layout import layout_lines, trainable_line


def test_rows_tell_every_degree() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    training = TrainingConfig(
        micro_batch_size=2,
        global_batch_size=16,
        bf16=True,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=3,
    )
    rows = dict(layout_rows(parallel, training, 8, "cpu", "float32"))
    assert rows == {
        "world size": "8 (cpu)",
        "tensor parallel": "2",
        "pipeline parallel": "2",
        "context parallel": "1",
        "data parallel": "2",
        "sequence parallel": "on",
        "distributed optimizer": "off",
        "recompute": "full, block, 3 layers",
        "dtype": "bf16, computed in fp32",
        "micro batch size": "2",
        "global batch size": "16 (4 micro-batches a step and rank)",
    }


def test_rows_without_switches() -> None:
    rows = dict(layout_rows(ParallelConfig(), TrainingConfig(), 1, "cuda"))
    assert (rows["dtype"], rows["recompute"], rows["sequence parallel"]) == ("fp32", "off", "off")


def test_context_parallelism_is_told_with_its_kind() -> None:
    hybrid = ParallelConfig(
        context_parallel_size=4, context_parallel_algo="hybrid_cp_algo", ulysses_degree_in_cp=2
    )
    rows = dict(layout_rows(hybrid, TrainingConfig(), 8, "cpu"))
    assert (rows["context parallel"], rows["data parallel"]) == ("4 (all-to-all over 2, ring of 2)", "2")
    ring = dict(layout_rows(ParallelConfig(context_parallel_size=2), TrainingConfig(), 2, "cpu"))
    assert ring["context parallel"] == "2 (ring of 2)"


def test_selective_recompute_is_named() -> None:
    training = TrainingConfig(recompute_granularity="selective")
    assert dict(layout_rows(ParallelConfig(), training, 1, "cpu"))["recompute"] == "selective"


def test_table_is_aligned_and_ends_with_the_trained_share() -> None:
    counts = ParameterCounts(total=1_250_000, trainable=50_000, per_rank=(600_000, 700_000))
    lines = layout_lines([("world size", "2 (cpu)")], counts)
    assert lines == [
        "-" * 41,
        " world size          | 2 (cpu)",
        " parameters          | 1,250,000 in all",
        " parameters per rank | 600,000 / 700,000",
        "-" * 41,
        "trainable params: 50,000 || all params: 1,250,000 || trainable%: 4.0000",
    ]


def test_many_ranks_are_summed_up() -> None:
    equal = ParameterCounts(total=16, trainable=1, per_rank=(1,) * 16)
    uneven = ParameterCounts(total=16, trainable=1, per_rank=tuple(range(1000, 1016)))
    assert " parameters per rank | 1" in layout_lines([], equal)
    assert " parameters per rank | 1,000 to 1,015" in layout_lines([], uneven)


def test_no_parameters_at_all() -> None:
    assert trainable_line(ParameterCounts(total=0, trainable=0)).endswith("trainable%: 0.0000")
