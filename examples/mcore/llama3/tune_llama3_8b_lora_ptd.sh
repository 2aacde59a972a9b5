#!/usr/bin/env bash
# Fine-tunes Llama-3-8B with LoRA on attention and MLP, PP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/llama3_mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama3_hf/ CKPT_SAVE_DIR=./ckpt/llama3_lora \
#       examples/mcore/llama3/tune_llama3_8b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own SEQ_LENGTH 8192
own LR 1e-6
own WEIGHT_DECAY 0.0
own ADAM_BETA2 0.999
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 4096
own SEED 42
own VOCAB_SIZE 128256
own EVAL_ITERS 10

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6024 "$@"
