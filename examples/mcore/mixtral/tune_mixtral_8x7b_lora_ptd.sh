#!/usr/bin/env bash
# Fine-tunes Mixtral-8x7B with LoRA on attention and all experts, PP 4 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ CKPT_SAVE_DIR=./ckpt/mixtral-lora \
#       examples/mcore/mixtral/tune_mixtral_8x7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 4
own SEQ_LENGTH 32768
own TRAIN_ITERS 10
own MIN_LR 1.0e-6
own LR_DECAY_STYLE constant
own LR_DECAY_ITERS 1
own LR_WARMUP_FRACTION 0.01
own WEIGHT_DECAY 0
own MOE_AUX_LOSS_COEFF 0.02
own NUM_WORKERS 16
own NO_SHARED_STORAGE 1
own NO_CHECK_FOR_NAN_IN_LOSS_AND_GRAD 1
own OVERLAP_GRAD_REDUCE 1
own OVERLAP_PARAM_GATHER 1
own EVAL_ITERS 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6005 "$@"
