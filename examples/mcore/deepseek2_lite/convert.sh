# Sourced after ../tables/convert.sh: what the conversions of DeepSeek-V2-Lite-16B say of their own.

own HF_MODEL_PATH ./model_from_hf/deepseek2_lite_hf/
own MG_MODEL_PATH ./model_weights/deepseek2_lite_mcore/
own LORA_PATH ./ckpt/deepseek2_lite_lora
own MERGED_PATH ./model_weights/deepseek2_lite_lora2mcore
own MODEL_TYPE_HF deepseek2-lite

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
