#!/usr/bin/env bash
# Turns a Hugging Face folder of Mixtral-8x22B into a Megatron checkpoint of TP x PP x EP shards whose linears hold
# 4 bits a weight.
#
#   HF_MODEL_PATH=./model_from_hf/Mixtral-8x22B/ TP=2 PP=1 EP=1 \
#   CKPT_SAVE_DIR=./model_weights/Mixtral-mcore-nf4/ \
#       examples/mcore/mixtral/ckpt_convert_mixtral_hf2mcore_qlora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own HF_MODEL_PATH ./model_from_hf/Mixtral-8x22B/
own MG_MODEL_PATH ./model_weights/Mixtral-mcore-nf4/
own TP 2
own PP 1
own EP 1
own QLORA_NF4 1
# Quantised matrices are written each by itself; training takes them so.
own MOE_GROUPED_GEMM 0

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
