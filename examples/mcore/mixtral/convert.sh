# Sourced after ../tables/convert.sh: what the conversions of Mixtral-8x7B say of their own.

own HF_MODEL_PATH ./model_from_hf/Mixtral-8x7B/
own MG_MODEL_PATH ./model_weights/Mixtral-mcore/
own LORA_PATH ./ckpt/mixtral-lora
own MERGED_PATH ./model_weights/mixtral-lora2mcore
own MODEL_TYPE_HF mixtral

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
