# Sourced after ../tables/convert.sh: what the conversions of Llama-3-8B say of their own.

own HF_MODEL_PATH ./model_from_hf/llama3_hf/
own MG_MODEL_PATH ./model_weights/llama3_mcore/
own LORA_PATH ./ckpt/llama3_lora
own MERGED_PATH ./model_weights/llama3_lora2mcore
own MODEL_TYPE_HF llama2
