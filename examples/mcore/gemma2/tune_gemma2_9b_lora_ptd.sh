#!/usr/bin/env bash
# Fine-tunes Gemma-2-9B with LoRA on attention and MLP, PP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/gemma2_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/gemma2_hf/ CKPT_SAVE_DIR=./ckpt/gemma2_lora \
#       examples/mcore/gemma2/tune_gemma2_9b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own NUM_LAYER_LIST 5,5,5,5,5,5,5,7
own SEQ_LENGTH 8192
own GLOBAL_BATCH_SIZE 64
own LR 1e-6
own ADAM_BETA2 0.999
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 1
own EVAL_INTERVAL 1000

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6014 "$@"
