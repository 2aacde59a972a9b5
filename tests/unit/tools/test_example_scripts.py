"""Llama 2's scripts: unchanged they are the published jobs; and the rules of every script (``job.sh``)."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "examples" / "mcore" / "llama2"
TARGETS = "linear_qkv linear_proj linear_fc1 linear_fc2"
LAUNCH = "--nproc_per_node 8 --nnodes 1 --node_rank 0 --master_addr localhost --master_port"

PUBLISHED = {
    "tune_llama2_7b_lora_ptd.sh": f"""
        {LAUNCH} 6080 posttrain_gpt.py
        --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --sequence-parallel --num-layers 32
        --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --seq-length 4096
        --max-position-embeddings 4096 --use-mcore-models --prompt-type llama2
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path 'your tokenizer path'
        --micro-batch-size 4 --global-batch-size 128 --make-vocab-size-divisible-by 1 --train-iters 1000
        --lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --min-lr 1.25e-6 --weight-decay 1e-1
        --clip-grad 1.0 --swiglu --position-embedding-type rope --untie-embeddings-and-output-weights
        --disable-bias-linear --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
        --use-fused-rmsnorm --use-flash-attn --no-masked-softmax-fusion --attention-softmax-in-fp32
        --init-method-std 0.01 --initial-loss-scale 65536 --adam-beta1 0.9 --adam-beta2 0.98
        --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-pad-to-seq-lengths
        --rotary-base 10000 --norm-epsilon 1e-05 --vocab-size 32000 --log-throughput --bf16 --finetune
        --stage sft --is-instruction-dataset --lora-r 16 --lora-alpha 32 --lora-fusion
        --lora-target-modules {TARGETS} --data-path 'your data path' --split 949,50,1 --log-interval 1
        --save-interval 500 --eval-interval 10000 --eval-iters 0 --load 'your model ckpt path'
        --save 'your model save ckpt path' --log-throughput --distributed-backend nccl""",
    "tune_llama2_70b_qlora_ptd.sh": f"""
        {LAUNCH.replace("_node 8", "_node 2")} 6080 posttrain_gpt.py
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --sequence-parallel --use-mcore-models
        --prompt-type llama2 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path 'your tokenizer path'
        --micro-batch-size 1 --global-batch-size 1 --train-iters 2000 --lr 1.0e-6 --lr-decay-style cosine
        --lr-warmup-fraction 0.00 --weight-decay 0.0 --clip-grad 1.0 --swiglu --position-embedding-type rope
        --untie-embeddings-and-output-weights --disable-bias-linear --hidden-dropout 0.0 --normalization RMSNorm
        --use-flash-attn --no-masked-softmax-fusion --attention-softmax-in-fp32 --init-method-std 0.01
        --initial-loss-scale 1 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8
        --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-pad-to-seq-lengths
        --rotary-base 10000 --norm-epsilon 1e-05 --make-vocab-size-divisible-by 1 --padded-vocab-size 32000
        --vocab-size 32000 --bf16 --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672
        --num-attention-heads 64 --seq-length 4096 --max-position-embeddings 4096
        --use-rotary-position-embeddings --group-query-attention --num-query-groups 8 --tokenizer-not-use-fast
        --attention-dropout 0.0 --seed 42 --exit-on-missing-checkpoint --finetune --stage sft
        --is-instruction-dataset --lora-r 16 --lora-alpha 32 --lora-target-modules {TARGETS} --qlora
        --data-path 'your data path' --split 100,0,0 --log-interval 1 --save-interval 2000
        --eval-interval 10000 --eval-iters 0 --load 'your model ckpt path' --save 'your model save ckpt path'
        --log-throughput --distributed-backend nccl""",
    "ckpt_convert_llama2_hf2mcore_qlora.sh": """
        convert_ckpt.py --model-type GPT --load-model-type hf --save-model-type mg
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1
        --load-dir ./model_from_hf/llama-2-70b-hf/ --save-dir ./model_weights/Llama2-mcore/
        --tokenizer-model ./model_from_hf/llama-2-70b-hf/tokenizer.model --use-mcore-models --qlora-nf4
        --model-type-hf llama2""",
    "generate_llama2_7b_lora_ptd.sh": f"""
        {LAUNCH} 6001 inference.py
        --lora-load 'your lora model directory path' --lora-r 16 --lora-alpha 32 --lora-fusion
        --lora-target-modules {TARGETS} --prompt-type llama2 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 1 --use-mcore-models --use-kv-cache --use-flash-attn
        --use-fused-swiglu --use-fused-rmsnorm --use-fused-rotary-pos-emb --num-layers 32 --hidden-size 4096
        --ffn-hidden-size 11008 --position-embedding-type rope --seq-length 4096 --max-new-tokens 256
        --micro-batch-size 4 --global-batch-size 16 --num-attention-heads 32 --max-position-embeddings 4096
        --swiglu --load 'your model directory path' --tokenizer-type PretrainedFromHF
        --tokenizer-name-or-path 'your tokenizer directory path'
        --tokenizer-model 'your tokenizer.model file path' --tokenizer-not-use-fast --fp16
        --normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear
        --attention-softmax-in-fp32 --no-load-optim --no-load-rng --no-masked-softmax-fusion
        --no-gradient-accumulation-fusion --exit-on-missing-checkpoint --make-vocab-size-divisible-by 1""",
    "data_convert_llama2_instruction.sh": """
        preprocess_data.py --input ./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet
        --tokenizer-name-or-path ./model_from_hf/llama-2-7b-hf/ --output-prefix ./finetune_dataset/alpaca
        --workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF --overwrite-cache
        --handler-name AlpacaStyleInstructionHandler --prompt-type llama2""",
    "ckpt_convert_llama2_hf2mcore.sh": """
        convert_ckpt.py --model-type GPT --load-model-type hf --save-model-type mg
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 1
        --load-dir ./model_from_hf/llama-2-7b-hf/ --save-dir ./model_weights/Llama2-mcore/
        --tokenizer-model ./model_from_hf/llama-2-7b-hf/tokenizer.model --use-mcore-models
        --model-type-hf llama2""",
    "ckpt_convert_llama2_mg2mg_lora.sh": f"""
        convert_ckpt.py --model-type GPT --load-model-type mg --save-model-type mg
        --load-dir ./model_weights/Llama2-mcore --lora-load ./ckpt/llama-7b-lora-mcore-tp1pp1
        --lora-r 16 --lora-alpha 32 --lora-target-modules {TARGETS}
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
        --save-dir ./model_weights/llama2-7b-lora2mcore --use-mcore-models --model-type-hf llama2""",
    "ckpt_convert_llama2_mcore2hf_lora.sh": f"""
        convert_ckpt.py --model-type GPT --use-mcore-models --load-model-type mg --save-model-type hf
        --load-dir ./model_weights/llama-2-7b-mcore/ --lora-load ./ckpt/llama-2-7b-lora
        --lora-r 16 --lora-alpha 32 --lora-target-modules {TARGETS}
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
        --save-dir ./model_from_hf/llama-2-7b-hf/""",
    "ckpt_convert_llama2_lora2hf.sh": f"""
        convert_ckpt.py --model-type GPT --use-mcore-models --load-model-type mg --save-model-type hf
        --load-dir ./ckpt/llama2_lora_filter --lora-r 16 --lora-alpha 32 --lora-target-modules {TARGETS}
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --load-checkpoint-loosely
        --save-lora-to-hf --save-dir ./model_from_hf/llama-2-7b-hf/""",
}


def options(words: list[str]) -> set[str]:
    """Each flag with its values; the entry file with what precedes it."""
    found: list[str] = [""]
    for word in words:
        if word.startswith("--"):
            found.append(word)
        else:
            found[-1] += f" {word}"
    return set(found)


@pytest.fixture
def arguments_of(script_arguments: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The command line of one of Llama 2's scripts."""
    return lambda script, *words, **variables: script_arguments(f"llama2/{script}", *words, **variables)


@pytest.mark.parametrize("script", PUBLISHED)
def test_unchanged_script_is_the_published_job(arguments_of, script: str) -> None:
    assert options(arguments_of(script)) == options(shlex.split(PUBLISHED[script]))


def test_empty_variable_leaves_the_flag_out(arguments_of) -> None:
    words = arguments_of("tune_llama2_7b_lora_ptd.sh", NUM_LAYERS="", UNTIE="0", LORA_TARGET_MODULES="")
    assert not {"--num-layers", "--untie-embeddings-and-output-weights", "--lora-target-modules"} & set(words)


def test_processes_follow_from_the_layout_unless_named(arguments_of) -> None:
    def launched(**variables: str) -> str:
        return arguments_of("tune_llama2_7b_lora_ptd.sh", **variables)[1]

    assert launched(TP="2", PP="2") == "4"
    assert launched(TP="2", NPROC="6") == "6"
    assert launched(TP="2", NPUS_PER_NODE="4") == "4"
    assert launched(TP="8", PP="2", NNODES="2") == "8"
    assert launched(TP="2", PP="2", CP="2") == "8"
    assert launched(TP="1", PP="2", EP="4") == "8"


def test_answers_that_are_generated_have_their_own_length(arguments_of) -> None:
    def given(**variables: str) -> str | None:
        words = arguments_of("evaluate_llama2_7B_lora_mmlu_ptd.sh", **variables)
        return words[words.index("--max-new-tokens") + 1] if "--max-new-tokens" in words else None

    assert given() == given(TASK="mmlu boolq") == "1"
    assert given(TASK="gsm8k") is given(TASK="mmlu bbh") is None
    assert given(TASK="gsm8k", MAX_NEW_TOKENS="9") == "9"


def test_values_with_blanks_stay_whole_and_own_arguments_come_last(arguments_of) -> None:
    words = arguments_of(
        "generate_llama2_7b_lora_ptd.sh", "--top-k", "3", PROMPT="two words", LORA_LOAD="", TASK="greedy chat"
    )
    assert words[words.index("--prompt") + 1] == "two words"
    assert words[words.index("--task") + 1 :][:2] == ["greedy", "chat"]
    assert words[-2:] == ["--top-k", "3"]
    assert not [word for word in words if "lora" in word]


def test_cores_are_shared_among_the_processes(arguments_of, tmp_path: Path) -> None:
    tell_threads = tmp_path / "threads"
    tell_threads.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\n')
    tell_threads.chmod(0o755)
    many = arguments_of("tune_llama2_7b_lora_ptd.sh", TORCHRUN=str(tell_threads), NPROC="10000")
    named = arguments_of("tune_llama2_7b_lora_ptd.sh", TORCHRUN=str(tell_threads), OMP_NUM_THREADS="3")
    assert (many, named) == (["1"], ["3"])


def test_vendor_environment_is_sourced_only_where_it_is(arguments_of, tmp_path: Path) -> None:
    file = tmp_path / "set_env.sh"
    # Such files read unset variables and run commands that fail.
    file.write_text('export LR="3e-3$NO_SUCH_VARIABLE"\nfalse\necho sourced\n')
    words = arguments_of("ckpt_convert_llama2_lora2hf.sh", ASCEND_ENVIRONMENT=str(file))
    assert words[:2] == ["sourced", "convert_ckpt.py"]


def test_the_callers_search_path_for_folders_is_not_asked(tmp_path: Path) -> None:
    """With CDPATH set, cd may lead elsewhere, and says where it has gone."""
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\necho "$1"\n')
    stub.chmod(0o755)
    script = (SCRIPTS / "ckpt_convert_llama2_lora2hf.sh").relative_to(ROOT)
    environment = {"PATH": os.environ["PATH"], "CDPATH": f"{ROOT}:.", "PYTHON": str(stub)}
    done = subprocess.run(
        ["bash", str(script)], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{ROOT / 'convert_ckpt.py'}\n"


def test_failure_is_passed_on() -> None:
    result = subprocess.run(
        [SCRIPTS / "ckpt_convert_llama2_lora2hf.sh"],
        env={"PATH": os.environ["PATH"], "PYTHON": "false"},
        check=False,
    )
    assert result.returncode == 1
