#!/usr/bin/env bash
# Fine-tunes MiniCPM-2B with LoRA on attention and MLP, data parallel on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/MiniCPM-2B-sft-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/MiniCPM-2B-sft-bf16/ CKPT_SAVE_DIR=./ckpt/minicpm_lora \
#       examples/mcore/minicpm/tune_minicpm_2b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own LR 1e-5
own MIN_LR 1e-6
own LR_WARMUP_FRACTION 0.01
own ADAM_BETA2 0.999
own INITIAL_LOSS_SCALE 65536
own OVERLAP_GRAD_REDUCE 1
own SAVE_INTERVAL 1000
own EVAL_INTERVAL 1000
own EVAL_ITERS 10

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6009 "$@"
