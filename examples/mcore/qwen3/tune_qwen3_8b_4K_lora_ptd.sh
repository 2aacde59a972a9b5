#!/usr/bin/env bash
# Fine-tunes Qwen3-8B with LoRA on attention and MLP, PP 2 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen3_hf/ CKPT_SAVE_DIR=./ckpt/qwen3_lora \
#       examples/mcore/qwen3/tune_qwen3_8b_4K_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 2
own MICRO_BATCH_SIZE 4
own GLOBAL_BATCH_SIZE 16
own LR 1.25e-5
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own SEED 42
own LORA_R 16
own LORA_ALPHA 32

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
