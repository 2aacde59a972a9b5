#!/usr/bin/env bash
# Turns a Hugging Face folder of DeepSeek-V3 into a Megatron checkpoint of TP x PP x EP shards whose linears hold 4
# bits a weight.
#
#   HF_MODEL_PATH=./model_from_hf/deepseek3-bf16/ TP=1 PP=8 EP=4 \
#   CKPT_SAVE_DIR=./model_weights/deepseek3-mcore-nf4/ \
#       examples/mcore/deepseek3/ckpt_convert_deepseek3_hf2mcore_qlora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own MG_MODEL_PATH ./model_weights/deepseek3-mcore-nf4/
own TP 1
own PP 8
own EP 4
own NUM_LAYER_LIST 7,7,7,8,8,8,8,8
own QLORA_NF4 1
# Quantised matrices are written each by itself; training takes them so.
own MOE_GROUPED_GEMM 0

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
