"""Scripts of models with experts: the published jobs but for what contradicts checkpoints."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.config.commands import COMMANDS, parse
from mindspeed_lora.config.moe import experts_from_flags
from mindspeed_lora.config.shape_flags import shape_from_flags

Arguments = Callable[..., list[str]]
TARGETS = "linear_qkv linear_proj linear_fc1 linear_fc2"
COMMON = f"""
    --nnodes 1 --node_rank 0 --master_addr localhost --nproc_per_node 8 --use-mcore-models --disable-bias-linear
    --init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
    --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights --no-masked-softmax-fusion
    --use-fused-rotary-pos-emb --use-flash-attn --use-fused-swiglu --use-fused-rmsnorm
    --make-vocab-size-divisible-by 1 --use-distributed-optimizer --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path 'your tokenizer path' --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
    --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --finetune --stage sft
    --is-instruction-dataset --lora-fusion --lora-target-modules {TARGETS} --data-path 'your data path'
    --split 100,0,0 --log-interval 1 --save-interval 2000 --eval-interval 2000 --distributed-backend nccl
    --load 'your model ckpt path' --save 'your model save ckpt path' --moe-permutation-async-comm
    --group-query-attention"""
"""What the published tuning scripts of the first three families have in common."""
PUBLISHED = {
    "mixtral/tune_mixtral_8x7b_lora_ptd.sh": """
        --master_port 6005 --num-experts 8 --expert-model-parallel-size 1 --moe-router-topk 1
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.02
        --moe-token-dispatcher-type alltoall --moe-router-pre-softmax --num-workers 16 --seq-length 32768
        --max-position-embeddings 32768 --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
        --num-attention-heads 32 --num-query-groups 8 --vocab-size 32000 --rotary-base 1000000
        --no-check-for-nan-in-loss-and-grad --overlap-grad-reduce --overlap-param-gather
        --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --sequence-parallel
        --variable-seq-lengths --context-parallel-size 1 --context-parallel-algo megatron_cp_algo
        --lr-warmup-fraction 0.01 --micro-batch-size 1 --global-batch-size 8 --lr 1e-5 --train-iters 10
        --lr-decay-iters 1 --lr-decay-style constant --min-lr 1.0e-6 --weight-decay 0 --no-shared-storage
        --prompt-type mixtral --lora-r 8 --lora-alpha 16 --eval-iters 1 --log-throughput""",
    "qwen2_moe/tune_qwen2_57b_a14b_4k_lora.sh": """
        --master_port 6000 --prompt-type qwen --padded-samples --variable-seq-lengths --lora-r 8
        --lora-alpha 16 --num-experts 64 --moe-router-topk 8 --n-shared-experts 8 --shared-expert-gate
        --moe-router-load-balancing-type softmax_topk --moe-intermediate-size 2560 --moe-grouped-gemm
        --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.001 --use-rotary-position-embeddings
        --micro-batch-size 1 --global-batch-size 8 --lr 7.75e-7 --lr-decay-style cosine --min-lr 7.75e-8
        --weight-decay 1e-1 --lr-warmup-fraction 0.01 --initial-loss-scale 4096 --seed 42 --train-iters 2000
        --seq-length 4096 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
        --max-position-embeddings 4096 --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944
        --num-attention-heads 28 --padded-vocab-size 151936 --rotary-base 1000000
        --attention-softmax-in-fp32 --add-qkv-bias --num-query-groups 4 --eval-iters 0""",
    "qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd.sh": """
        --master_port 6000 --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
        --moe-grouped-gemm --moe-token-dispatcher-type alltoall_seq
        --moe-router-load-balancing-type aux_loss --moe-layer-freq -1 --first-k-dense-replace -1
        --moe-aux-loss-coeff 0.001 --sequence-parallel --use-rotary-position-embeddings --micro-batch-size 8
        --global-batch-size 64 --lr 1.25e-5 --lr-decay-style cosine --min-lr 1.25e-7 --weight-decay 1e-1
        --lr-warmup-fraction 0.01 --initial-loss-scale 4096 --seed 42 --train-iters 2000 --seq-length 4096
        --no-shared-storage --tensor-model-parallel-size 4 --pipeline-model-parallel-size 1
        --expert-model-parallel-size 1 --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
        --kv-channels 128 --qk-layernorm --norm-topk-prob --max-position-embeddings 4096 --num-layers 48
        --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --padded-vocab-size 151936
        --rotary-base 1000000 --attention-softmax-in-fp32 --num-query-groups 4 --eval-iters 0
        --tokenizer-not-use-fast --prompt-type qwen3 --no-pad-to-seq-lengths --lora-r 16 --lora-alpha 32""",
}
QLORA_COMMON = (
    COMMON.replace("--lora-fusion", "").replace("--nproc_per_node 8", "").replace("--clip-grad 1.0", "")
    .replace("--adam-beta2 0.95", "").replace("--nnodes 1", "")
)  # fmt: skip
"""What the published QLoRA scripts share with them."""
PUBLISHED_QLORA = {
    "mixtral/tune_mixtral_8x22b_qlora_ptd.sh": """
        --nproc_per_node 2 --nnodes 1 --master_port 6005 --num-experts 8 --expert-model-parallel-size 1
        --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall
        --moe-aux-loss-coeff 0.001 --seq-length 32768 --max-position-embeddings 32768 --num-layers 56
        --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 --num-query-groups 8
        --vocab-size 32000 --rotary-base 1000000 --no-check-for-nan-in-loss-and-grad --overlap-grad-reduce
        --overlap-param-gather --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
        --sequence-parallel --variable-seq-lengths --lr-warmup-fraction 0.0 --micro-batch-size 1
        --global-batch-size 1 --lr 2e-7 --train-iters 2000 --lr-decay-style cosine --weight-decay 0
        --no-shared-storage --prompt-type mixtral --adam-beta2 0.999 --seed 42 --lora-r 8 --lora-alpha 16
        --qlora --eval-iters 1 --log-throughput""",
    "deepseek3/tune_deepseek3_671b_4k_qlora_ptd.sh": """
        --nproc_per_node 8 --nnodes 4 --master_port 6000 --multi-head-latent-attention --qk-rope-head-dim 64
        --qk-nope-head-dim 128 --q-lora-rank 1536 --kv-lora-rank 512 --v-head-dim 128 --qk-layernorm
        --moe-token-dispatcher-type alltoall_seq --first-k-dense-replace 3 --moe-layer-freq 1
        --n-shared-experts 1 --num-experts 256 --moe-router-topk 8 --moe-intermediate-size 2048
        --moe-ffn-hidden-size 2048 --moe-router-load-balancing-type noaux_tc --topk-group 4
        --routed-scaling-factor 2.5 --seq-aux --norm-topk-prob --moe-router-score-function sigmoid
        --moe-router-enable-expert-bias --rope-scaling-beta-fast 32 --rope-scaling-beta-slow 1
        --rope-scaling-factor 40 --rope-scaling-mscale 1.0 --rope-scaling-mscale-all-dim 1.0
        --rope-scaling-original-max-position-embeddings 4096 --rope-scaling-type yarn
        --spec mindspeed_llm.tasks.models.spec.deepseek_spec layer_spec --num-layer-list 7,7,7,8,8,8,8,8
        --prompt-type deepseek3 --variable-seq-lengths --no-shared-storage --reuse-fp32-param
        --shape-order BNSD --tensor-model-parallel-size 1 --pipeline-model-parallel-size 8
        --expert-model-parallel-size 4 --sequence-parallel --context-parallel-size 1
        --context-parallel-algo ulysses_cp_algo --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
        --num-attention-heads 128 --seq-length 4096 --max-position-embeddings 163840 --micro-batch-size 1
        --global-batch-size 128 --lr 1.0e-5 --train-iters 200 --lr-decay-style cosine
        --use-rotary-position-embeddings --attention-softmax-in-fp32 --min-lr 1.0e-7 --weight-decay 1e-2
        --lr-warmup-iters 1 --clip-grad 1.0 --adam-beta2 0.999 --initial-loss-scale 65536
        --vocab-size 129280 --padded-vocab-size 129280 --rotary-base 10000 --norm-epsilon 1e-6
        --distributed-timeout-minutes 120 --save-interval 50 --eval-iters 0 --no-save-optim --no-save-rng
        --init-method-std 0.02 --log-throughput --lora-r 8 --lora-alpha 16 --lora-fusion --qlora""",
}
OTHERWISE = {
    "--moe-router-topk 1": "the checkpoint's two",
    "--moe-router-pre-softmax": "the checkpoint's weights sum to one",
    "--variable-seq-lengths": "--no-pad-to-seq-lengths is its name since",
    "--moe-intermediate-size 2560": "--moe-ffn-hidden-size is Megatron's name",
}
"""Published flags that are left out or named otherwise."""
ADDED = {
    "--moe-alltoall-overlap-comm", "--moe-grouped-gemm", "--no-pad-to-seq-lengths", "--moe-ffn-hidden-size 2560",
    "--moe-router-topk 2", "--sequence-parallel", "--attention-softmax-in-fp32", "--context-parallel-size 1",
    "--use-rotary-position-embeddings", "--context-parallel-algo megatron_cp_algo", "--log-throughput",
    "--expert-model-parallel-size 1",
}  # fmt: skip
"""What ours say beside the published ones: defaults spelled out, overlap and grouped products, and SP with TP."""


def options(words: list[str]) -> set[str]:
    """Each flag with its values."""
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            found.append(word)
        elif found:
            found[-1] += f" {word}"
    return set(found)


def command_line(words: list[str]) -> tuple[str, list[str]]:
    """The command and its own words."""
    entry = next(word for word in words if word.endswith(".py"))
    name = next(name for name, command in COMMANDS.items() if command.script == entry)
    return name, words[words.index(entry) + 1 :]


def world(script: str) -> dict[str, str]:
    """The published number of devices."""
    if "8x22b" in script:
        return {"WORLD_SIZE": "2"}
    return {
        "WORLD_SIZE": "32" if "deepseek3_671b_4k_qlora" in script else "64" if "deepseek3" in script else "8"
    }


@pytest.mark.parametrize("script", PUBLISHED)
def test_unchanged_script_is_the_published_job(script_arguments: Arguments, script: str) -> None:
    published = options(shlex.split(COMMON + PUBLISHED[script]))
    found = {one.removesuffix(" posttrain_gpt.py") for one in options(script_arguments(script))}
    assert published - found <= OTHERWISE.keys()
    assert found - published <= ADDED


@pytest.mark.parametrize("script", PUBLISHED_QLORA)
def test_unchanged_qlora_script_is_the_published_job(script_arguments: Arguments, script: str) -> None:
    published = options(shlex.split(QLORA_COMMON + PUBLISHED_QLORA[script]))
    found = {one.removesuffix(" posttrain_gpt.py") for one in options(script_arguments(script))}
    usual = {
        "--init-method-std 0.01": "DeepSeek's is another",
        "--save-interval 2000": "and so is this",
        "--moe-intermediate-size 2048": "--moe-ffn-hidden-size is given too",
        "--reuse-fp32-param": "no effect on what is trained",
        "--shape-order BNSD": "of a vendor's kernel",
        "--group-query-attention": "not of latent attention",
        "--multi-head-latent-attention": "--multi-latent-attention is Megatron's name",
    }
    assert published - found <= OTHERWISE.keys() | usual.keys()
    assert found - published <= ADDED | {
        *("--clip-grad 1.0", "--multi-latent-attention", "--moe-router-num-groups 8", "--save-interval 50"),
    }


@pytest.mark.parametrize(
    ("script", "parameters"),
    [
        ("mixtral/tune_mixtral_8x7b_lora_ptd.sh", 46.7e9),
        ("qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd.sh", 30.5e9),
        ("qwen2_moe/tune_qwen2_57b_a14b_4k_lora.sh", 57.4e9),
        ("mixtral/tune_mixtral_8x22b_qlora_ptd.sh", 140.6e9),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd.sh", 671e9),
        ("deepseek3/tune_deepseek3_671b_4k_qlora_ptd.sh", 671e9),
    ],
)
def test_the_flags_alone_tell_the_published_model(
    script_arguments: Arguments, script: str, parameters: float
) -> None:
    job: Any = parse(*command_line(script_arguments(script, "--dry-run")), world(script))
    shape = experts_from_flags(job.experts, shape_from_flags(job.model))
    assert shape.family == {"mixtral": "mixtral", "deepseek3": "deepseek_v3"}.get(
        script.partition("/")[0], script.partition("/")[0]
    )
    found = sum(math.prod(size) for size in canonical_tensors(shape).values())
    assert found == pytest.approx(parameters, rel=2e-3)
