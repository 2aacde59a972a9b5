# Sourced after ../tables/convert.sh: what the conversions of Qwen3-8B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen3_hf/
own MG_MODEL_PATH ./model_weights/qwen3_mcore/
own LORA_PATH ./ckpt/qwen3_lora
own MERGED_PATH ./model_weights/qwen3_lora2mcore
own MODEL_TYPE_HF qwen3
