#!/usr/bin/env bash
# Fine-tunes Llama-2-7B with LoRA on attention and MLP, TP 8 on 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf/ CKPT_SAVE_DIR=./ckpt/llama-2-7b-lora \
#       examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own TP 8
own MICRO_BATCH_SIZE 4
own GLOBAL_BATCH_SIZE 128
own TRAIN_ITERS 1000
own LR 5e-5
own LR_WARMUP_FRACTION 0.01
own MIN_LR 1.25e-6
own INITIAL_LOSS_SCALE 65536
own ADAM_BETA2 0.98
own SPLIT 949,50,1
own LORA_R 16
own LORA_ALPHA 32
own SAVE_INTERVAL 500
own EVAL_INTERVAL 10000
own USE_DISTRIBUTED_OPTIMIZER 0
own USE_FUSED_ROTARY_POS_EMB 0
own USE_ROTARY_POSITION_EMBEDDINGS 0
own USE_FUSED_SWIGLU 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6080 "$@"
