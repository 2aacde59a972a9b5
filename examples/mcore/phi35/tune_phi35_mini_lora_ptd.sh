#!/usr/bin/env bash
# Fine-tunes Phi-3.5-mini with LoRA on attention and MLP, PP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/phi35_mini_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Phi-3.5-mini-instruct/ CKPT_SAVE_DIR=./ckpt/phi35_mini_lora \
#       examples/mcore/phi35/tune_phi35_mini_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own GLOBAL_BATCH_SIZE 16
own LR 1.25e-6
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own SEED 42

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
