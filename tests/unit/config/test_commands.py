from __future__ import annotations

import subprocess
import sys

import pytest

from mindspeed_lora.config.accepted import NO_EFFECT
from mindspeed_lora.config.commands import COMMANDS, chosen_command, grammar, parse, sections
from mindspeed_lora.config.features import NOT_BUILT
from mindspeed_lora.config.flags import options
from mindspeed_lora.config.jobs import ConversionJob, InferenceJob, PreprocessJob, TrainJob
from mindspeed_lora.errors import Refused

TUNE = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --sequence-parallel --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --seq-length 4096
    --max-position-embeddings 4096 --use-mcore-models --prompt-type llama2 --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path tok --micro-batch-size 4 --global-batch-size 128 --make-vocab-size-divisible-by 1
    --train-iters 1000 --lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --min-lr 1.25e-6
    --weight-decay 1e-1 --clip-grad 1.0 --swiglu --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0.0 --hidden-dropout 0.0
    --normalization RMSNorm --use-fused-rmsnorm --use-flash-attn --no-masked-softmax-fusion
    --attention-softmax-in-fp32 --init-method-std 0.01 --initial-loss-scale 65536 --adam-beta1 0.9
    --adam-beta2 0.98 --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-pad-to-seq-lengths
    --rotary-base 10000 --norm-epsilon 1e-05 --vocab-size 32000 --log-throughput --bf16 --finetune --stage sft
    --is-instruction-dataset --lora-r 16 --lora-alpha 32 --lora-fusion
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --data-path data --split 949,50,1
    --log-interval 1 --save-interval 500 --eval-interval 10000 --eval-iters 0 --load base --save out
    --log-throughput --distributed-backend nccl
"""
LORA = "--lora-r 16 --lora-alpha 32 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2"
CONVERSIONS = [
    """--model-type GPT --load-model-type hf --save-model-type mg --target-tensor-parallel-size 8
    --target-pipeline-parallel-size 1 --load-dir ./hf/ --save-dir ./mg/ --tokenizer-model ./hf/tokenizer.model
    --use-mcore-models --model-type-hf llama2""",
    f"""--model-type GPT --load-model-type mg --save-model-type mg --load-dir ./base
    --lora-load ./adapter {LORA}
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --save-dir ./merged
    --use-mcore-models --model-type-hf llama2""",
    f"""--model-type GPT --use-mcore-models --load-model-type mg --save-model-type hf --load-dir ./base
    --lora-load ./adapter {LORA}
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --save-dir ./hf/""",
    f"""--model-type GPT --use-mcore-models --load-model-type mg --save-model-type hf --load-dir ./adapter
    {LORA} --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --load-checkpoint-loosely
    --save-lora-to-hf --save-dir ./hf/""",
    f"""--load-model-type mg --save-model-type hf --load-dir ./adapter {LORA} --save-lora-to-hf
    --save-dir ./hf/ --hf-cfg-dir ./hf/ --model-type-hf llama2""",
]
GENERATE = f"""
    --lora-load adapter {LORA} --lora-fusion --prompt-type llama2 --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 1 --use-mcore-models --use-kv-cache --use-flash-attn --use-fused-swiglu
    --use-fused-rmsnorm --use-fused-rotary-pos-emb --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008
    --position-embedding-type rope --seq-length 4096 --max-new-tokens 256 --micro-batch-size 4
    --global-batch-size 16 --num-attention-heads 32 --max-position-embeddings 4096 --swiglu --load base
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path tok --tokenizer-model tok/tokenizer.model
    --tokenizer-not-use-fast --fp16 --normalization RMSNorm --untie-embeddings-and-output-weights
    --disable-bias-linear --attention-softmax-in-fp32 --no-load-optim --no-load-rng --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion --exit-on-missing-checkpoint --make-vocab-size-divisible-by 1
"""


def test_the_published_tuning_job() -> None:
    job = parse("posttrain", TUNE.split(), {"WORLD_SIZE": "8"})
    assert isinstance(job, TrainJob)
    assert job.parallel.tensor_model_parallel_size == 8
    assert job.data.variable_seq_lengths
    assert job.data.split == "949,50,1"
    assert job.lora.lora_target_modules == ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    assert job.training.adam_beta2 == 0.98
    assert job.training.warmup_steps(1000) == pytest.approx(10.0)
    assert job.checkpoint.finetune and job.checkpoint.no_load_optim and job.checkpoint.save_interval == 500
    assert job.model.norm_epsilon == 1e-5
    assert [notice.split(":")[0] for notice in job.notices] == ["no effect here"]


@pytest.mark.parametrize("line", CONVERSIONS)
def test_the_published_conversions(line: str) -> None:
    job = parse("convert", line.split(), {})
    assert isinstance(job, ConversionJob)
    assert job.lora.enabled == ("--lora-r" in line)
    assert job.conversion.save_lora_to_hf == ("--save-lora-to-hf" in line)


def test_the_published_generation() -> None:
    job = parse("inference", GENERATE.split(), {"WORLD_SIZE": "8"})
    assert isinstance(job, InferenceJob)
    assert job.inference.max_new_tokens == 256
    assert job.inference.params_dtype == "float16"
    assert job.checkpoint.load == "base"


def test_the_published_preparation() -> None:
    line = """--input train.parquet --tokenizer-name-or-path hf --output-prefix out/alpaca --workers 4
        --log-interval 1000 --tokenizer-type PretrainedFromHF --overwrite-cache
        --handler-name AlpacaStyleInstructionHandler --prompt-type llama2"""
    job = parse("preprocess", line.split(), {})
    assert isinstance(job, PreprocessJob)
    assert job.preprocess.workers == 4
    assert job.tokenizer.prompt_type == "llama2"


def test_given_holds_what_the_user_gave() -> None:
    job = parse("posttrain", ["--data-path", "p", "--lr", "1e-4"], {})
    assert job.given == {"data_path", "lr"}


def test_pretraining_is_a_stage_of_its_own() -> None:
    assert parse("pretrain", ["--data-path", "p"], {}).training.stage == "pretrain"
    assert parse("posttrain", ["--data-path", "p"], {}).training.stage == "sft"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_flag_and_field_belongs_to_one_section(command: str) -> None:
    found = sections(COMMANDS[command].job_type).values()
    described = [option for section in found for option in options(section)]
    names = [name for option in described for name in option.names]
    assert len(names) == len(set(names))
    assert len(described) == len({option.dest for option in described})


def test_a_flag_is_not_both_without_effect_and_refused() -> None:
    assert not NO_EFFECT.keys() & NOT_BUILT.keys()
    assert not grammar("posttrain").options.keys() & NO_EFFECT.keys() - {
        "--seed",
        "--workers",
        "--make-vocab-size-divisible-by",
        # Conversion runs no code of a folder.
        "--trust-remote-code",
        # Without effect on the commands that work in one process.
        *("--world-size", "--nnodes", "--nproc_per_node", "--nproc-per-node"),
    }


def test_the_configuration_imports_no_heavy_package() -> None:
    code = (
        "import sys, mindspeed_lora.entry; "
        "heavy = {'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_word_chooses_the_command() -> None:
    assert chosen_command("convert", ["inspect", "a"]) == ("inspect", ["a"])
    assert chosen_command("convert", ["--load-dir", "inspect"]) == ("convert", ["--load-dir", "inspect"])
    assert chosen_command("convert", []) == ("convert", [])
    assert chosen_command("inference", ["verify"]) == ("inference", ["verify"])


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("inspect", "", "DIR is missing"),
        ("verify", "", "A is missing"),
        ("verify", "a --tolerance 1", "--tolerance is given with one checkpoint only"),
        ("verify", "your_path", ""),
    ],
)
def test_folders_of_inspect_and_verify(command: str, line: str, message: str) -> None:
    if not message:
        assert parse(command, line.split(), {}).verify.second is None
        return
    with pytest.raises(Refused, match=message):
        parse(command, line.split(), {})


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("convert", "--load-model-type hf --save-model-type mg --load-dir a --save-dir b"),
        ("preprocess", "--input a --tokenizer-name-or-path b --output-prefix c"),
    ],
)
def test_a_world_size_is_taken_where_one_process_works(command: str, line: str) -> None:
    job = parse(command, [*line.split(), "--dry-run", "--world-size", "512"], {})
    assert "no effect here: --world-size" in job.notices
