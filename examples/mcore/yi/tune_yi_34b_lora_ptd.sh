#!/usr/bin/env bash
# Fine-tunes Yi-34B with LoRA on attention and MLP, TP 4 x PP 2 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Yi-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Yi-hf/ CKPT_SAVE_DIR=./ckpt/yi_lora \
#       examples/mcore/yi/tune_yi_34b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 4
own PP 2
own GLOBAL_BATCH_SIZE 16
own LR 1.25e-6
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own SEED 42

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
