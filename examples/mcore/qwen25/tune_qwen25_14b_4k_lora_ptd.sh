#!/usr/bin/env bash
# Fine-tunes Qwen2.5-14B with LoRA on attention and MLP, PP 4 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen2.5_7b_hf/ CKPT_SAVE_DIR=./ckpt/qwen25_lora \
#       examples/mcore/qwen25/tune_qwen25_14b_4k_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model-14b.sh
# and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 4
own NUM_LAYER_LIST 13,13,13,9
own GLOBAL_BATCH_SIZE 16
own LR 1.25e-6
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own WEIGHT_DECAY 0.0
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 4096
own SEED 1234
own OVERLAP_GRAD_REDUCE 1
own NO_SAVE_OPTIM 1
own NO_SAVE_RNG 1

# shellcheck source=model-14b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-14b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
