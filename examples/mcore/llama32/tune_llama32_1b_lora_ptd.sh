#!/usr/bin/env bash
# Fine-tunes Llama-3.2-1B with LoRA on attention and MLP, data parallel on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/llama32-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama32-hf/ CKPT_SAVE_DIR=./ckpt/llama32_lora \
#       examples/mcore/llama32/tune_llama32_1b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own LR 1.25e-5
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own SEED 42

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
