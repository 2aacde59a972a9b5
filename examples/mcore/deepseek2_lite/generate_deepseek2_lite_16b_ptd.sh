#!/usr/bin/env bash
# Generates text with DeepSeek-V2-Lite-16B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek2_lite_mcore/ LORA_LOAD=./ckpt/deepseek2_lite_lora \
#   TOKENIZER_PATH=./model_from_hf/deepseek2_lite_hf/ TASK=greedy \
#       examples/mcore/deepseek2_lite/generate_deepseek2_lite_16b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own EP 8
own SEQ_LENGTH 8192

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6000 "$@"
