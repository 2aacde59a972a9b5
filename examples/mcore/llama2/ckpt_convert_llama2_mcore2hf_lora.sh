#!/usr/bin/env bash
# Merges a LoRA adapter into its base model: a complete Hugging Face folder in <CKPT_SAVE_DIR>/mg2hf/.
#
#   CKPT_LOAD_DIR=./model_weights/llama-2-7b-mcore LORA_LOAD=./ckpt/llama-2-7b-lora \
#   CKPT_SAVE_DIR=./model_from_hf/llama-2-7b-hf \
#       examples/mcore/llama2/ckpt_convert_llama2_mcore2hf_lora.sh [more flags]
#
# Configuration and tokenizer come from HF_CFG_DIR, else from CKPT_SAVE_DIR where it is the model's original folder
# (nothing in it is touched), else from the Megatron checkpoint.
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

flag   --model-type                       MODEL_TYPE           GPT
switch --use-mcore-models                 USE_MCORE_MODELS     1
flag   --load-model-type                  LOAD_MODEL_TYPE      mg
flag   --save-model-type                  SAVE_MODEL_TYPE      hf
flag   --load-dir                         CKPT_LOAD_DIR        ./model_weights/llama-2-7b-mcore/
flag   --lora-load                        LORA_LOAD            ./ckpt/llama-2-7b-lora
flag   --lora-r                           LORA_R               16
flag   --lora-alpha                       LORA_ALPHA           32
words  --lora-target-modules              LORA_TARGET_MODULES  "linear_qkv linear_proj linear_fc1 linear_fc2"
flag   --target-tensor-parallel-size      TP                   1
flag   --target-pipeline-parallel-size    PP                   1
flag   --save-dir                         CKPT_SAVE_DIR        ./model_from_hf/llama-2-7b-hf/
flag   --hf-cfg-dir                       HF_CFG_DIR           ""
flag   --params-dtype                     PARAMS_DTYPE         ""
switch --overwrite                        OVERWRITE            0

run_alone convert_ckpt.py "$@"
