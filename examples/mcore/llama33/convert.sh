# Sourced after ../tables/convert.sh: what the conversions of Llama-3.3-70B say of their own.

own HF_MODEL_PATH ./model_from_hf/llama33-hf/
own MG_MODEL_PATH ./model_weights/llama33-mcore/
own LORA_PATH ./ckpt/llama33_lora
own MERGED_PATH ./model_weights/llama33_lora2mcore
own MODEL_TYPE_HF llama2
