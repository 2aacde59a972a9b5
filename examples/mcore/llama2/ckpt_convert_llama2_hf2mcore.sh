#!/usr/bin/env bash
# Turns a Hugging Face folder into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/llama-2-7b-hf TP=8 CKPT_SAVE_DIR=./model_weights/Llama2-mcore \
#       examples/mcore/llama2/ckpt_convert_llama2_hf2mcore.sh [more flags]
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

hf_model=${HF_MODEL_PATH-./model_from_hf/llama-2-7b-hf/}

flag   --model-type                       MODEL_TYPE        GPT
flag   --load-model-type                  LOAD_MODEL_TYPE   hf
flag   --save-model-type                  SAVE_MODEL_TYPE   mg
flag   --target-tensor-parallel-size      TP                8
flag   --target-pipeline-parallel-size    PP                1
flag   --load-dir                         HF_MODEL_PATH     "$hf_model"
flag   --save-dir                         CKPT_SAVE_DIR     ./model_weights/Llama2-mcore/
flag   --tokenizer-model                  TOKENIZER_MODEL   "${hf_model%/}/tokenizer.model"
switch --use-mcore-models                 USE_MCORE_MODELS  1
flag   --model-type-hf                    MODEL_TYPE_HF     llama2
flag   --params-dtype                     PARAMS_DTYPE      ""
switch --overwrite                        OVERWRITE         0

run_alone convert_ckpt.py "$@"
