#!/usr/bin/env bash
# Fine-tunes Qwen1.5-32B with LoRA on attention and MLP, PP 4 on 4 devices.
#
#   CKPT_LOAD_DIR=./model_weights/qwen15_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/qwen15_hf/ CKPT_SAVE_DIR=./ckpt/qwen15_lora \
#       examples/mcore/qwen15/tune_qwen15_32b_lora_pad.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-4}"
own PP 4
own VPP 2
own SEQ_LENGTH 2048
own GLOBAL_BATCH_SIZE 128
own TRAIN_ITERS 5000
own LR 1.25e-6
own MIN_LR 1.25e-7
own LR_WARMUP_FRACTION 0.01
own INITIAL_LOSS_SCALE 4096
own SAVE_INTERVAL 5000
own EVAL_INTERVAL 5000
own LORA_R 16
own LORA_ALPHA 32

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
