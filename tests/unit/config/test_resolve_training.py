from __future__ import annotations

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.errors import Refused


def job(line: str, environ: dict[str, str] | None = None) -> TrainJob:
    found = parse("posttrain", ["--data-path", "p", *line.split()], environ or {})
    assert isinstance(found, TrainJob)
    return found


def refusal(line: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(Refused) as error:
        job(line, environ)
    return str(error.value)


def test_a_short_line_is_a_whole_job() -> None:
    found = job("--load base --lora-r 8 --save out")
    assert (found.lora.lora_r, found.lora.lora_alpha) == (8, 16)
    assert found.lora.lora_target_modules == ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    training = found.training
    assert (training.lr, training.lr_decay_style, training.lr_warmup_fraction) == (1e-4, "cosine", 0.03)
    assert (training.micro_batch_size, training.global_batch_size, training.epochs) == (1, 16, 3.0)
    assert found.notices == (
        "defaults taken: --lr 0.0001, --lr-decay-style cosine, --micro-batch-size 1, --global-batch-size 16, "
        "--lr-warmup-fraction 0.03, --epochs 3, --lora-alpha 16, "
        "--lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2",
        "no --save-interval: one checkpoint, at the end; a run that is killed before has none",
    )


@pytest.mark.parametrize(
    ("flags", "rows"),
    [("--world-size 512 --tensor-model-parallel-size 2", 256), ("--world-size 3 --micro-batch-size 4", 24)],
)
def test_the_default_global_batch_divides(flags: str, rows: int) -> None:
    found = job(f"--load base --lora-r 8 --dry-run {flags}")
    assert found.training.global_batch_size == rows
    assert f"--global-batch-size {rows}," in found.notices[0]
    assert "use for example" in refusal(f"--load base --lora-r 8 --dry-run {flags} --global-batch-size 16")


def test_no_lora_flag_trains_all_parameters() -> None:
    found = job("--load base")
    assert not found.lora.enabled
    assert found.lora.lora_target_modules is None


@pytest.mark.parametrize(
    "line", ["--lora-ckpt-filter", "--lora-dropout 0.0", "--lora-alpha 32", "--lora-fusion"]
)
def test_any_lora_flag_makes_an_adapter(line: str) -> None:
    lora = job(line).lora
    assert lora.enabled
    assert lora.lora_r == 16
    assert lora.lora_alpha == 32


def test_a_loaded_adapter_tells_what_is_left_out() -> None:
    lora = job("--lora-load adapter").lora
    assert lora.enabled
    assert (lora.lora_r, lora.lora_alpha, lora.lora_target_modules) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--lora-fusion-chunks 2",
            "--lora-fusion-chunks 2 says how --lora-fusion works, which is not given; add it",
        ),
        ("--lora-fusion-interleave", "--lora-fusion-interleave says how --lora-fusion works"),
        ("--lora-fusion-plan auto", "--lora-fusion-plan auto says how --lora-fusion works"),
        (
            "--lora-fusion --lora-fusion-plan fastest",
            "--lora-fusion-plan fastest: expected one of auto, one-collective",
        ),
        ("--lora-fusion --lora-fusion-plan auto overlapped", "give one of auto, overlapped"),
        ("--lora-fusion --lora-fusion-plan one-collective merge split", "give one of merge, split"),
        (
            "--lora-fusion --lora-fusion-plan overlapped --lora-fusion-chunks 2",
            "--lora-fusion-chunks is of the one-coll",
        ),
        (
            "--lora-fusion --lora-fusion-plan overlapped --lora-fusion-interleave",
            "-interleave is of the one-collective",
        ),
        ("--lora-fusion --lora-fusion-chunks -1", "--lora-fusion-chunks -1: expected a number of at least 0"),
    ],
)
def test_what_fusion_flags_contradict(line: str, words: str) -> None:
    assert words in refusal(line)


@pytest.mark.parametrize(
    "line", ["", "--lora-fusion-plan auto merge", "--lora-fusion-plan split --lora-fusion-chunks 0"]
)
def test_fusion_flags_that_agree(line: str) -> None:
    assert job(f"--lora-fusion {line}").lora.lora_fusion


def test_what_is_given_is_no_default() -> None:
    line = (
        "--lr 1e-4 --lr-decay-style constant --micro-batch-size 2 --global-batch-size 4 --lr-warmup-iters 0"
    )
    found = job(f"{line} --train-iters 5")
    assert found.notices == ()
    assert found.training.epochs is None
    assert found.training.lr_warmup_fraction is None


def test_packing_to_a_fixed_length_is_told() -> None:
    told = "--packing without --variable-seq-lengths pads each packed row to --seq-length"
    assert told in job("--packing").notices
    assert told not in job("--packing --no-pad-to-seq-lengths").notices


def test_a_degree_of_another_algorithm_is_told() -> None:
    line = "--context-parallel-size 2 --ulysses-degree-in-cp 2 --context-parallel-algo"
    told = "--ulysses-degree-in-cp has an effect with --context-parallel-algo hybrid_cp_algo only"
    assert told in job(f"{line} ulysses_cp_algo", {"WORLD_SIZE": "2"}).notices
    assert told not in job(f"{line} hybrid_cp_algo", {"WORLD_SIZE": "2"}).notices


def test_only_a_dry_run_saves_in_no_folder() -> None:
    told = "--save-interval is given without --save: the run itself needs the name of its folder"
    assert told in job("--save-interval 5 --dry-run").notices


def test_instruction_rows_make_pretraining_fine_tuning() -> None:
    made = parse("pretrain", ["--is-instruction-dataset", "--data-path", "d"], {})
    assert made.training.stage == "sft" and any("--stage sft" in notice for notice in made.notices)


def test_names_of_linears_may_be_a_list_with_commas() -> None:
    assert job("--lora-target-modules linear_qkv,linear_proj q.{1,2}").lora.lora_target_modules == (
        "linear_qkv",
        "linear_proj",
        "q.{1,2}",
    )


def test_full_recompute_alone_takes_each_layer() -> None:
    assert job("--recompute-activations").training.recompute_granularity == "selective"
    assert "drop one" in refusal("--recompute-activations --recompute-granularity full")
    training = job("--recompute-granularity full").training
    assert (training.recompute_method, training.recompute_num_layers) == ("uniform", 1)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--bf16 --fp16", ["--bf16 and --fp16"]),
        ("--train-iters 5 --epochs 2", ["--train-iters 5 and --epochs 2"]),
        ("--train-samples 5 --epochs 2", ["--train-samples 5 and --epochs 2"]),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 2", ["--lr-warmup-fraction 0.1", "--lr-warmup-iters 2"]),
        ("--min-lr 1e-3", ["--min-lr 0.001", "--lr 0.0001"]),
        ("--train-iters 5 --lr-warmup-iters 5", ["--lr-warmup-iters 5", "below the 5 steps"]),
        ("--recompute-method block", ["--recompute-method block", "--recompute-granularity full"]),
        ("--recompute-granularity selective --recompute-num-layers 2", ["--recompute-num-layers 2"]),
        ("--calculate-per-token-loss --loss-normalization micro-batch", ["--calculate-per-token-loss"]),
        ("--overlap-param-gather --overlap-grad-reduce", ["add --use-distributed-optimizer"]),
        ("--paged-optimizer-dir /tmp", ["--paged-optimizer, which is not given; add it"]),
        ("--prompt-type qwen --hf-chat-template", ["--prompt-type qwen and --hf-chat-template"]),
        ("--save-interval 5", ["--save-interval", "--save;"]),
        ("--resume auto", ["--resume auto", "--save;"]),
        ("--save s --resume auto --overwrite", ["--resume auto", "--overwrite"]),
        ("--save s --save-best", ["--save-best needs an evaluation"]),
        ("--save s --save-best --eval-iters 2", ["--save-best needs an evaluation"]),
        ("--early-stopping-patience 2 --split 90,10,0", ["--early-stopping-patience needs an evaluation"]),
        ("--exit-on-missing-checkpoint", ["--exit-on-missing-checkpoint is given without --load"]),
        ("--load your model path", ["--load is still the placeholder 'your model path'"]),
        ("--stage pretrain --is-instruction-dataset", ["--is-instruction-dataset"]),
        ("--stage pretrain --packing", ["--packing is for instruction rows", "--reset-attention-mask"]),
        ("--stage pretrain --neat-pack", ["--neat-pack is for instruction rows"]),
        ("--eod-mask-loss", ["--eod-mask-loss is for plain text"]),
        ("--packing --loss-normalization micro-batch", ["--packing", "--loss-normalization token"]),
        (
            "--global-batch-size 3 --micro-batch-size 2",
            ["--global-batch-size 3", "data-parallel size 1 = 2", "4"],
        ),
        ("--tensor-model-parallel-size 2", ["world size 1", "size 2 x", "= 2"]),
        ("--context-parallel-size 2", ["world size 1", "x --context-parallel-size 2 = 2"]),
        ("--world-size 4", ["--world-size 4: the world has 1"]),
    ],
)
def test_contradictions_are_refused(line: str, parts: list[str]) -> None:
    message = refusal(line)
    assert [part for part in parts if part not in message] == [], message


def test_the_world_must_fit_the_degrees() -> None:
    line = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    assert "world size 6 is not divisible by" in refusal(line, {"WORLD_SIZE": "6"})
    assert job(line, {"WORLD_SIZE": "8"}).parallel.data_parallel_size(8) == 2
    assert "data-parallel size 3 = 3" in refusal("--global-batch-size 16", {"WORLD_SIZE": "3"})


def test_the_data_path_is_needed() -> None:
    with pytest.raises(Refused, match="--data-path is missing"):
        parse("posttrain", [], {})


def test_a_dry_run_needs_no_input_and_no_launcher() -> None:
    found = parse(
        "posttrain",
        ["--dry-run", "--data-path", "your", "data", "path", "--tensor-model-parallel-size", "8"],
        {},
    )
    assert found.runtime.resolve_world_size(found.parallel, {}) == 8


@pytest.mark.parametrize(
    ("line", "environ", "world_size"),
    [
        ("--world-size 32 --nnodes 2 --nproc_per_node 8", {"WORLD_SIZE": "2"}, 32),
        ("--nnodes 2 --nproc_per_node 8", {"WORLD_SIZE": "2"}, 2),
        ("--nnodes 2 --nproc-per-node 8", {}, 16),
        ("--pipeline-model-parallel-size 2", {}, 2),
    ],
)
def test_the_world_of_a_dry_run(line: str, environ: dict[str, str], world_size: int) -> None:
    found = job(f"--dry-run --global-batch-size 64 {line}", environ)
    assert found.runtime.resolve_world_size(found.parallel, environ) == world_size


def test_a_dry_run_checks_the_batch() -> None:
    assert "data-parallel size 12" in refusal("--dry-run --world-size 12 --global-batch-size 16")


def test_evaluation_without_a_validation_part_is_told() -> None:
    assert any("no evaluation" in notice for notice in job("--eval-iters 2").notices)
    assert not any("no evaluation" in notice for notice in job("--eval-iters 2 --split 9,1").notices)
    assert not any("no evaluation" in notice for notice in job("--eval-iters 2 --valid-data-path v").notices)


def test_quantised_weights_take_an_adapter() -> None:
    resolved = job("--load m --data-path p --qlora --quant-type fp4 --quant-block-size 128")
    assert resolved.lora.lora_r == 16
    assert str(resolved.quantization.settings()) == "fp4, blocks of 128"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--quant-type nf4", "--quant-type nf4 says how --qlora quantises, which is not given"),
        ("--quant-double", "--quant-double says how --qlora quantises, which is not given"),
        ("--qlora --quant-block-size 48", "--quant-block-size 48: expected one of 32, 64, 128"),
        ("--qlora --quant-type int8 --quant-double", "--quant-double: --quant-type int8 has one unquantised"),
        ("--qlora --quant-type int8 --quant-block-size 64", "--quant-block-size 64: --quant-type int8"),
        ("--qlora-nf4 --quant-type int8", "--qlora-nf4 asks for nf4, but --quant-type is int8"),
        ("--qlora --quant-type int4", "--quant-type int4: expected one of nf4, fp4, int8"),
    ],
)
def test_what_quantisation_flags_contradict(line: str, words: str) -> None:
    assert words in refusal(f"--load m --data-path p {line}")
