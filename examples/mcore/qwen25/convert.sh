# Sourced after ../tables/convert.sh: what the conversions of Qwen2.5-7B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen2.5_7b_hf/
own MG_MODEL_PATH ./model_weights/qwen2.5_mcore/
own LORA_PATH ./ckpt/qwen25_lora
own MERGED_PATH ./model_weights/qwen25_lora2mcore
own MODEL_TYPE_HF llama2
