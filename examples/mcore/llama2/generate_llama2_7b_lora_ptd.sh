#!/usr/bin/env bash
# Generates text with Llama-2-7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore/ LORA_LOAD=./ckpt/llama-2-7b-lora \
#   TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf/ TASK=greedy \
#       examples/mcore/llama2/generate_llama2_7b_lora_ptd.sh [more flags]
#
# LORA_LOAD= (empty) leaves the adapter out. Flags, their variables and values: ../tables/model.sh,
# ../tables/generate.sh; what is said here and in model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0
own LORA_LOAD "your lora model directory path"
own LORA_R 16
own LORA_ALPHA 32
own LORA_TARGET_MODULES "linear_qkv linear_proj linear_fc1 linear_fc2"
own CKPT_LOAD_DIR "your model directory path"
own TOKENIZER_PATH "your tokenizer directory path"
own TOKENIZER_MODEL "your tokenizer.model file path"
own TOKENIZER_NOT_USE_FAST 1
own MICRO_BATCH_SIZE 4
own GLOBAL_BATCH_SIZE 16
own BF16 0
own FP16 1
own ROTARY_BASE ""
own NORM_EPSILON ""
own VOCAB_SIZE ""
own USE_ROTARY_POSITION_EMBEDDINGS 0
own EXIT_ON_MISSING_CHECKPOINT 1
own DISTRIBUTED_BACKEND ""

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
