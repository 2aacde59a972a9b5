# Sourced by the conversion scripts of DeepSeek-V3: what is its own. The flags are those of ../convert_experts.sh.

# shellcheck source=../convert_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert_experts.sh"

own HF_MODEL_PATH ./model_from_hf/deepseek3-bf16/
own MG_MODEL_PATH ./model_weights/deepseek3-mcore/
own LORA_PATH ./ckpt/deepseek3_lora
own MERGED_PATH ./model_weights/deepseek3_lora2mcore
own MODEL_TYPE_HF deepseek3
own LORA_R 8
own LORA_ALPHA 16
