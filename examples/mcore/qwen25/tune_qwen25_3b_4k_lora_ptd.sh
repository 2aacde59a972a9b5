#!/usr/bin/env bash
# Fine-tunes Qwen2.5-3B with LoRA on attention and MLP, data parallel on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen2.5_7b_hf/ CKPT_SAVE_DIR=./ckpt/qwen25_lora \
#       examples/mcore/qwen25/tune_qwen25_3b_4k_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model-3b.sh and
# model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own LR 7.75e-7
own MIN_LR 7.75e-8
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own SEED 42
own OVERLAP_GRAD_REDUCE 1

# shellcheck source=model-3b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-3b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
