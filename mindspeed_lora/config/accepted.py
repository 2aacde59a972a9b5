"""Flags of published scripts that change no number here: accepted, and told in one notice.

They choose a kernel, a device setting or a habit of another system, or say what is the case here anyway.
"""

from __future__ import annotations

from mindspeed_lora.config.flags import Arity

_KERNELS_AND_DEVICE = """
    use-flash-attn use-fused-rmsnorm use-fused-swiglu use-fused-rotary-pos-emb use-fused-mlp
    use-fused-ring-attention-update no-masked-softmax-fusion no-bias-swiglu-fusion no-bias-gelu-fusion
    no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm no-gradient-accumulation-fusion
    gemm-gradient-accumulation-fusion attention-softmax-in-fp32 apply-query-key-layer-scaling
    accumulate-allreduce-grads-in-fp32 use-ascend-mc2 use-mc2 use-ascend-coc use-cp-send-recv-overlap
    attention-mask-on-cpu tp-comm-overlap no-async-tensor-model-parallel-allreduce
    reuse-fp32-param swap-attention recompute-activation-function recompute-in-advance
    recompute-in-bubble jit-compile use-cpu-initialization npu-deterministic use-deter-comp
    mla-fa-without-pad shape-order=1 recompute-activation-function-num-layers=1
    moe-grouped-gemm moe-permute-fusion moe-permutation-async-comm
    use-fused-moe-token-permute-and-unpermute moe-revert-type-after-topk moe-bmm-mc2
    transformer-impl=1 empty-unused-memory-level=1 attention-backend=1 cross-entropy-loss-fusion
    cross-entropy-fusion-impl=1 no-scatter-gather-tensors-in-pipeline use-ring-exchange-p2p
    ai-framework=1 coc-fused-kernel coc-parallel-num=1 cp-window-size=1 kv-head-repeat-before-uly-alltoall
    loss-compute-mode=1 loss-chunk-size=1 moe-fb-overlap enable-mla-absorb skip-bias-add
    cuda-graph-impl=1 tp-comm-overlap-cfg=1 ddp-num-buckets=1 no-align-param-gather init-model-with-meta-device
    overlap-param-gather-with-optimizer-step overlap-p2p-communication no-overlap-p2p-communication
    use-tp-pp-dp-mapping nccl-communicator-config-path=1 high-priority-stream-groups=+ distribute-saved-activations
    deterministic-mode fp16-lm-cross-entropy lazy-mpu-init=1 train-sync-interval=1 no-barrier-with-level-1-timing
"""

_TRUE_HERE_ANYWAY = """
    use-mcore-models use-rotary-position-embeddings use-kv-cache exit-signal-handler enable-hf2mg-convert
    reset-attention-mask-in-cp full-shuffle-instruction-dataset cut-max-seqlen
    return-document-ids streaming save-layer-by-layer
    load-hf-from-config load-checkpoint-loosely spec=* dataset-additional-keys=*
    lora-register-forward-hook=+ cp-comm-type=+ num-workers=1 workers=1
    model-type-hf=1 hf-cfg-dir=1 mg-save-dir=1 seed=1 make-vocab-size-divisible-by=1 pad-vocab-size-to=1
    mtp-mem-efficient-logits mtp-loss-scaling-factor=1 max-batch-size=1 max-tokens-to-oom=1 ckpt-cfg-path=1
    max-queue-size=1 loader=1 megatron-path=1 longrope-freqs-type=1
    n-subs=1 cache-dir=1 log-timers-to-tensorboard log-validation-ppl-to-tensorboard
    log-memory-to-tensorboard tensorboard-queue-size=1 timing-log-level=1 log-batch-size-to-tensorboard
    num-dataset-builder-threads=1 no-mmap-bin-files no-create-attention-mask-in-dataloader
    auto-detect-ckpt-format override-opt_param-scheduler no-initialization no-position-embedding
    use-rotary-position-embedding topk-softmax-in-fp32 input-layernorm-in-fp32 init-norm-weight-in-fp32
    rmsnorm-weight-in-fp32 trust-remote-code
    use-checkpoint-args no-use-tokenizer-model-from-checkpoint-args async-save ckpt-assume-constant-structure
    ckpt-fully-parallel-save ckpt-fully-parallel-load no-ckpt-fully-parallel-save dist-ckpt-strictness=1
    check-for-nan-in-loss-and-grad check-for-large-grads log-params-norm log-num-zeros-in-grad log-progress
    moe-per-layer-logging logging-level=1 no-one-logger enable-experimental
    profile profile-step-start=1 profile-step-end=1 profile-ranks=+ use-pytorch-profiler record-memory-history
    memory-snapshot-path=1
"""

_OF_GENERATION = """
    top-k=1 top-p=1 temperature=1 do-sample max-length=1
"""

_LAUNCHER = """
    world-size=1 nnodes=1 nproc_per_node=1 nproc-per-node=1
    node_rank=1 node-rank=1 master_addr=1 master-addr=1 master_port=1 master-port=1 local_rank=1 local-rank=1
"""


def _table(text: str) -> dict[str, Arity]:
    arities: dict[str, Arity] = {"": "0", "0": "0", "1": "1", "+": "+", "*": "*"}
    entries = (entry.partition("=") for entry in text.split())
    return {f"--{name}": arities[arity] for name, _, arity in entries}


NO_EFFECT: dict[str, Arity] = _table(_KERNELS_AND_DEVICE + _TRUE_HERE_ANYWAY + _LAUNCHER)
"""Flag name → number of words that follow it."""

GENERATION_ONLY: dict[str, Arity] = _table(_OF_GENERATION)
"""Flags of ``inference.py`` that published evaluation scripts repeat."""
