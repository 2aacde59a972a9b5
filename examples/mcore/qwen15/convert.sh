# Sourced after ../tables/convert.sh: what the conversions of Qwen1.5-32B say of their own.

own HF_MODEL_PATH ./model_from_hf/qwen15_hf/
own MG_MODEL_PATH ./model_weights/qwen15_mcore/
own LORA_PATH ./ckpt/qwen15_lora
own MERGED_PATH ./model_weights/qwen15_lora2mcore
own MODEL_TYPE_HF llama2
own LORA_R 16
own LORA_ALPHA 32
