# Sourced by the conversion scripts of Mixtral-8x7B: what is its own. The flags are those of ../convert_experts.sh.

# shellcheck source=../convert_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert_experts.sh"

own HF_MODEL_PATH ./model_from_hf/Mixtral-8x7B/
own MG_MODEL_PATH ./model_weights/Mixtral-mcore/
own LORA_PATH ./ckpt/mixtral-lora
own MERGED_PATH ./model_weights/mixtral-lora2mcore
own MODEL_TYPE_HF mixtral
own LORA_R 8
own LORA_ALPHA 16
