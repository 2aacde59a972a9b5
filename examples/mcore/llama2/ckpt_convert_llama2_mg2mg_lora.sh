#!/usr/bin/env bash
# Merges a LoRA adapter into its base model: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore LORA_LOAD=./ckpt/llama-2-7b-lora TP=1 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/llama2-7b-lora2mcore \
#       examples/mcore/llama2/ckpt_convert_llama2_mg2mg_lora.sh [more flags]
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

flag   --model-type                       MODEL_TYPE           GPT
flag   --load-model-type                  LOAD_MODEL_TYPE      mg
flag   --save-model-type                  SAVE_MODEL_TYPE      mg
flag   --load-dir                         CKPT_LOAD_DIR        ./model_weights/Llama2-mcore
flag   --lora-load                        LORA_LOAD            ./ckpt/llama-7b-lora-mcore-tp1pp1
flag   --lora-r                           LORA_R               16
flag   --lora-alpha                       LORA_ALPHA           32
words  --lora-target-modules              LORA_TARGET_MODULES  "linear_qkv linear_proj linear_fc1 linear_fc2"
flag   --target-tensor-parallel-size      TP                   1
flag   --target-pipeline-parallel-size    PP                   1
flag   --save-dir                         CKPT_SAVE_DIR        ./model_weights/llama2-7b-lora2mcore
switch --use-mcore-models                 USE_MCORE_MODELS     1
flag   --model-type-hf                    MODEL_TYPE_HF        llama2
flag   --params-dtype                     PARAMS_DTYPE         ""
switch --overwrite                        OVERWRITE            0

run_alone convert_ckpt.py "$@"
