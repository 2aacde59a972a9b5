# Sourced by the conversion scripts of Qwen2-57B-A14B: what is its own. The flags are those of ../convert_experts.sh.

# shellcheck source=../convert_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert_experts.sh"

own HF_MODEL_PATH ./model_from_hf/qwen2_moe_hf/
own MG_MODEL_PATH ./model_weights/qwen2_moe_mcore/
own LORA_PATH ./ckpt/qwen2_moe_lora
own MERGED_PATH ./model_weights/qwen2_moe_lora2mcore
own MODEL_TYPE_HF qwen2-moe
own LORA_R 8
own LORA_ALPHA 16
