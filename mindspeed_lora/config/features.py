"""Flags of features that are not there: known, and refused unless their value leaves the feature off.

Ignoring them would train or convert something other than what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_lora.config.flags import Arity


@dataclass(frozen=True)
class Feature:
    """One flag of a feature that is not there."""

    what: str
    """The words that refuse it."""
    arity: Arity
    off: tuple[str, ...] = ()
    """Values that leave the feature off, and are therefore fine."""

    def is_off(self, words: Sequence[str]) -> bool:
        """Whether these values leave the feature off."""
        return bool(words) and all(word in self.off for word in words)


def _features(what: str, text: str) -> dict[str, Feature]:
    """Read ``name``, ``name=arity`` and ``name=arity:off,off`` entries."""
    table = {}
    arities: dict[str, Arity] = {"": "0", "1": "1", "+": "+", "*": "*"}
    for entry in text.split():
        name, _, value = entry.partition("=")
        arity, _, off = value.partition(":")
        table[f"--{name}"] = Feature(what, arities[arity], tuple(off.split(",")) if off else ())
    return table


NOT_BUILT: dict[str, Feature] = {
    **_features(
        "this flag of mixture-of-experts models is not supported by this version",
        """target-expert-parallel-size=1:1 moe-router-force-load-balancing fix-router
        moe-input-jitter-eps=1 moe-router-bias-update-rate=1:0,0.0 moe-hierarchical-alltoallv
        moe-device-level-aux-loss-coeff=1:0,0.0 moe-comm-aux-loss-coeff=1:0,0.0 moe-train-capacity-factor=1""",
    ),
    **_features(
        "attention is causal, over the window of --sliding-window-size or over all positions",
        """sparse-mode=1:0,2,3 pre-tockens=1:65536,1048576,2147483647 next-tockens=1:0
        attention-mask-type=1:causal,general cp-attention-mask-type=1:causal,general""",
    ),
    **_features(
        "the optimizer is AdamW with states in float32",
        """optimizer=1:adam,adamw use-precision-aware-optimizer main-grads-dtype=1:fp32 main-params-dtype=1:fp32
        exp-avg-dtype=1:fp32 exp-avg-sq-dtype=1:fp32 grad-reduce-in-bf16 fp32-residual-connection""",
    ),
    **_features("its states go to host memory with --paged-optimizer", "optimizer-cpu-offload"),
    **_features(
        "8-bit and 4-bit floating point (fp8, fp4) is not supported by this version; a frozen base is quantised by "
        "--qlora",
        """fp8-format=1 fp8-recipe=1 fp8-margin=1 fp8-interval=1 fp8-amax-history-len=1 fp8-amax-compute-algo=1
        fp8-param-gather fp4-format=1""",
    ),
    **_features(
        "the schedule counts steps (--lr-warmup-iters, --lr-decay-iters) at one batch size and one rate",
        """lr-warmup-samples=1:0 lr-decay-samples=1 rampup-batch-size=+ step-batch-size-schedule=+ decoupled-lr=1
        decoupled-min-lr=1 lr-warmup-init=1:0,0.0""",
    ),
    **_features(
        "parameters are whole on each data-parallel rank; --use-distributed-optimizer cuts the optimizer's states",
        "use-megatron-fsdp use-torch-fsdp2 data-parallel-sharding-strategy=1:no_shard",
    ),
    **_features("an iteration is named by its own folder in --load", "ckpt-step=1"),
    **_features("the scaling of positions is named by --rope-scaling-type", "use-rope-scaling"),
    **_features("training reads your own data (--data-path)", "mock-data"),
    **_features("instruction rows are trained by posttrain_gpt.py --stage sft", "sft"),
    **_features("stages are told by --num-layer-list or --noop-layers", "pipeline-model-parallel-layout=1"),
    **_features("selective recomputation is that of attention", "recompute-modules=+:core_attn"),
    **_features("the only schedules are 1F1B and interleaved 1F1B", "schedules-method=1"),
    **_features("rows come in Megatron's order, shuffled anew in each epoch", "dataloader-type=1:single"),
    **_features("rows longer than --seq-length are cut or dropped as --overlong says", "no-cut-token"),
    **_features(
        "only plain LoRA is supported by this version",
        "lu-lora-final-layer-index=1 lu-lora-lr=1 lu-lora-lr-ratio=1 use-dora",
    ),
    **_features(
        "preference and reward training are not supported by this version",
        """is-pairwise-dataset dpo-loss-type=1 dpo-beta=1 dpo-label-smoothing=1 pref-ftx=1 ref-model=1
        refer-model-iter=1 simpo-beta=1 gamma-beta-ratio=1 simpo-loss-type=1 simpo-label-smoothing=1
        reward-tokens=+ placeholder-token=1 reward-model=1 orm kl-coef=1 gamma=1 lam=1 max-prompt-length=1""",
    ),
    **_features("the up projections of multi-latent attention are not split in this version", "mla-mm-split"),
    **_features(
        "multi-token prediction is not supported by this version",
        "mtp-num-layers=1:0 mtp-after-norm mtp-spec=+ recompute-mtp-layer recompute-mtp-norm",
    ),
    **_features(
        "models of this kind are not supported by this version",
        """compress-ratios=+ compress-rope-theta=1
        enable-dsa-indexer
        enable-mhc hc-mult=1 index-head-dim=1 index-n-heads=1 index-topk=1 indexer-loss-coeff=1 kv-compress
        n-hash-layers=1 o-groups=1 o-lora-rank=1 original-seq-len=1 rope-factor=1 use-fused-lightning-indexer
        use-fused-lightning-indexer-loss use-fused-mhc use-sparse-flash-attn use-triton-mhc embed-layernorm w-pack
        add-output-layer-bias add-bias-linear squared-relu no-post-layer-norm use-partial-rope
        dynamic-factor=1:1,1.0
        square-alibi-mask fill-neg-inf full-attention-interval=1 mamba-d-conv=1 mamba-expand=1 mamba-chunk-size=1
        linear-key-head-dim=1 linear-num-key-heads=1 linear-num-value-heads=1 linear-value-head-dim=1
        partial-rotary-factor=1 no-enable-linear-qkv use-triton-gdn fc-type=1 cla-share-factor=1 share-kvstates
        window-size=1 window-attn-skip-freq=1 quick-geglu glu-linear-offset=1 softmax-type=1:vanilla
        activation-func-clamp-value=1 enable-gpt-oss num-zero-experts=1 enable-mla-scale-q-lora
        enable-mla-scale-kv-lora index-topk-freq=1
        index-skip-topk-offset=1 index-share-for-mtp-iteration""",
    ),
    **_features(
        "only Megatron's legacy checkpoint format (torch) is supported by this version",
        "load-from-legacy save-to-legacy target-data-parallel-size=1:1",
    ),
    **_features(
        "training finds the form of --load by itself and saves Megatron's legacy one (torch)",
        "ckpt-format=1:torch use-dist-ckpt dist-ckpt-format=1",
    ),
    **_features(
        "training writes no Hugging Face model by itself; run convert_ckpt.py on what it saves",
        "enable-mg2hf-convert hf-save-dir=1 only-convert-last-checkpoint",
    ),
    **_features(
        "this kind of input is not supported by this version of preprocess_data.py",
        """script-data-dir=1 data-obfuscation obf-seed-content=1
        dataset-impl=1:mmap pad-to-multiple-of=1:1""",
    ),
    **_features("texts are tokenised whole, not cut into sentences", "split-sentences keep-newlines"),
    **_features(
        "these settings mix input files in preprocess_data.py; in training give --data-path several prefixes",
        "hf-datasets-params=1 datasets=+ interleave-probs=1 mix-strategy=1:concat dataset-dir=1 max-samples=1 "
        "merge-group-keys=+",
    ),
    **_features(
        "only the built-in templates and the tokenizer's own are supported by this version",
        "reasoning-effort=1 drop-thinking tokenizer-padding-side=1:right",
    ),
    **_features(
        "tokenizers are read from a Hugging Face folder (--tokenizer-name-or-path)",
        "vocab-file=1 merge-file=1",
    ),
    **_features(
        "special tokens are those of the tokenizer's own tokenizer_config.json", "tokenizer-kwargs=+"
    ),
    **_features("training reads rows from --data-path, prepared or raw", "input=1"),
    **_features(
        "this command only reads: there is nothing to try without doing it",
        "dry-run",
    ),
}
"""Flag name → the feature that it belongs to."""

TRAINING_ONLY = (
    *("--moe-device-level-aux-loss-coeff", "--moe-comm-aux-loss-coeff", "--moe-train-capacity-factor"),
    *("--mtp-num-layers", "--mtp-after-norm", "--mtp-spec", "--recompute-mtp-layer", "--recompute-mtp-norm"),
)
"""Those of training, which change nothing where a model only answers."""
