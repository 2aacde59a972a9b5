#!/usr/bin/env bash
# Fine-tunes CodeLlama-34B with LoRA on attention and MLP, PP 2 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Codellama-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Codellama-hf/ CKPT_SAVE_DIR=./ckpt/codellama_lora \
#       examples/mcore/codellama/tune_codellama_34b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 2
own MICRO_BATCH_SIZE 2
own GLOBAL_BATCH_SIZE 16
own LR 1.0e-7
own MIN_LR 1.0e-8
own LR_WARMUP_FRACTION 0.01
own WEIGHT_DECAY 1e-2
own ADAM_BETA2 0.999
own INITIAL_LOSS_SCALE 8188.0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6001 "$@"
