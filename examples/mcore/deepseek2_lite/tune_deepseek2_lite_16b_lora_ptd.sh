#!/usr/bin/env bash
# Fine-tunes DeepSeek-V2-Lite-16B with LoRA on attention and all experts, EP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek2_lite_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/deepseek2_lite_hf/ CKPT_SAVE_DIR=./ckpt/deepseek2_lite_lora \
#       examples/mcore/deepseek2_lite/tune_deepseek2_lite_16b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own EP 8
own LR 9e-6
own LR_DECAY_ITERS 2000
own WEIGHT_DECAY 0.1
own INIT_METHOD_STD 0.008
own INITIAL_LOSS_SCALE 1
own SEQ_AUX 1
own MOE_AUX_LOSS_COEFF 0.01
own RECOMPUTE_GRANULARITY full
own RECOMPUTE_METHOD uniform
own RECOMPUTE_NUM_LAYERS 1
own NUM_WORKERS 8

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
