# Sourced after ../tables/convert.sh: what the conversions of Qwen2-7B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen2_hf/
own MG_MODEL_PATH ./model_weights/qwen2_mcore/
own LORA_PATH ./ckpt/qwen2_lora
own MERGED_PATH ./model_weights/qwen2_lora2mcore
own MODEL_TYPE_HF llama2
