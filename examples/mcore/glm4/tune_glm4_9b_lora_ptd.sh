#!/usr/bin/env bash
# Fine-tunes GLM-4-9B with LoRA on attention and MLP, TP 2 x PP 2 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/glm4_mcore DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/glm4_hf CKPT_SAVE_DIR=./ckpt/glm4_lora \
#       examples/mcore/glm4/tune_glm4_9b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 2
own PP 2
own SEQ_LENGTH 32768
own MICRO_BATCH_SIZE 2
own GLOBAL_BATCH_SIZE 64
own LR 1.25e-6
own MIN_LR 1e-8
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own OVERLAP_GRAD_REDUCE 1
own EVAL_INTERVAL 1000

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
