#!/usr/bin/env bash
# Fine-tunes Qwen2-7B with LoRA on attention and MLP, PP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen2_hf/ CKPT_SAVE_DIR=./ckpt/qwen2_lora \
#       examples/mcore/qwen2/tune_qwen2_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own NUM_LAYER_LIST 4,4,4,4,3,3,3,3
own MICRO_BATCH_SIZE 8
own GLOBAL_BATCH_SIZE 64
own LR 1.25e-6
own MIN_LR 1.25e-7
own WEIGHT_DECAY 0.0
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 4096
own SEED 1234

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
