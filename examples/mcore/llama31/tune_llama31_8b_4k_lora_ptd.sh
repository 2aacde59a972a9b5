#!/usr/bin/env bash
# Fine-tunes Llama-3.1-8B with LoRA on attention and MLP, data parallel on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/llama31-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama31-hf/ CKPT_SAVE_DIR=./ckpt/llama31_lora \
#       examples/mcore/llama31/tune_llama31_8b_4k_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own LR 7.75e-7
own MIN_LR 7.75e-8
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own SEED 1234

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
