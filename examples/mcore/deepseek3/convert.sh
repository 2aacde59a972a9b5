# Sourced after ../tables/convert.sh: what the conversions of DeepSeek-V3 say of their own.

own HF_MODEL_PATH ./model_from_hf/deepseek3-bf16/
own MG_MODEL_PATH ./model_weights/deepseek3-mcore/
own LORA_PATH ./ckpt/deepseek3_lora
own MERGED_PATH ./model_weights/deepseek3_lora2mcore
own MODEL_TYPE_HF deepseek3

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
