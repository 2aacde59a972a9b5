# Sourced after ../tables/convert.sh: what the conversions of Qwen2-57B-A14B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen2_moe_hf/
own MG_MODEL_PATH ./model_weights/qwen2_moe_mcore/
own LORA_PATH ./ckpt/qwen2_moe_lora
own MERGED_PATH ./model_weights/qwen2_moe_lora2mcore
own MODEL_TYPE_HF qwen2-moe

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
