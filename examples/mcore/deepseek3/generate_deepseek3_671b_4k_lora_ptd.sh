#!/usr/bin/env bash
# Generates text with DeepSeek-V3; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore/ LORA_LOAD=./ckpt/deepseek3_lora \
#   TOKENIZER_PATH=./model_from_hf/deepseek3-bf16/ TASK=greedy \
#       examples/mcore/deepseek3/generate_deepseek3_671b_4k_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own NNODES 8
own PP 4
own EP 16
own LORA_LOAD "your model lora ckpt path"
own LORA_R 8
own LORA_ALPHA 16
own LORA_TARGET_MODULES "linear_qkv linear_proj linear_fc1 linear_fc2"
own MAX_NEW_TOKENS 128
own TASK chat

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6000 "$@"
