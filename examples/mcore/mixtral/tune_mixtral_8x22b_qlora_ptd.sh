#!/usr/bin/env bash
# Fine-tunes Mixtral-8x22B with QLoRA on attention and all experts, TP 2 on 2 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore-nf4/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/Mixtral-8x22B/ CKPT_SAVE_DIR=./ckpt/mixtral-qlora \
#       examples/mcore/mixtral/tune_mixtral_8x22b_qlora_ptd.sh [more flags]
#
# CKPT_LOAD_DIR is what ckpt_convert_mixtral_hf2mcore_qlora.sh wrote, or any other checkpoint: a plain one is
# quantised while it is read. Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said
# here and in model-8x22b.sh and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-2}"
own TP 2
own QLORA 1
own LORA_FUSION 0
own SEQ_LENGTH 32768
own GLOBAL_BATCH_SIZE 1
own LR 2e-7
own LR_WARMUP_FRACTION 0.0
own WEIGHT_DECAY 0
own ADAM_BETA2 0.999
own SEED 42
own MOE_AUX_LOSS_COEFF 0.001
own NO_SHARED_STORAGE 1
own NO_CHECK_FOR_NAN_IN_LOSS_AND_GRAD 1
own OVERLAP_GRAD_REDUCE 1
own OVERLAP_PARAM_GATHER 1
own EVAL_ITERS 1

# shellcheck source=model-8x22b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-8x22b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6005 "$@"
