#!/usr/bin/env bash
# Fine-tunes Mistral-7B-Instruct-v0.2 with LoRA on attention and MLP, PP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Mistral-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Mistral-hf/ CKPT_SAVE_DIR=./ckpt/mistral_lora \
#       examples/mcore/mistral/tune_mistral_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own SEQ_LENGTH 32768
own GLOBAL_BATCH_SIZE 32
own LR 1.25e-6
own LR_DECAY_STYLE constant
own ADAM_BETA2 0.999
own INITIAL_LOSS_SCALE 1
own OVERLAP_GRAD_REDUCE 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6002 "$@"
