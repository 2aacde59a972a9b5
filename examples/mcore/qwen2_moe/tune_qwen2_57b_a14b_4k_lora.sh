#!/usr/bin/env bash
# Fine-tunes Qwen2-57B-A14B with LoRA on attention and all experts, TP 2 x PP 4 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2_moe_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen2_moe_hf/ CKPT_SAVE_DIR=./ckpt/qwen2_moe_lora \
#       examples/mcore/qwen2_moe/tune_qwen2_57b_a14b_4k_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 2
own PP 4
own LR 7.75e-7
own MIN_LR 7.75e-8
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own SEED 42
own MOE_ROUTER_LOAD_BALANCING_TYPE softmax_topk
own MOE_AUX_LOSS_COEFF 0.001
own PADDED_SAMPLES 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
