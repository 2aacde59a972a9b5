# Sourced after ../tables/convert.sh: what the conversions of Qwen3-30B-A3B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen3_moe_hf/
own MG_MODEL_PATH ./model_weights/qwen3_moe_mcore/
own LORA_PATH ./ckpt/qwen3_moe_lora
own MERGED_PATH ./model_weights/qwen3_moe_lora2mcore
own MODEL_TYPE_HF qwen3-moe
own LORA_R 16
own LORA_ALPHA 32

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
