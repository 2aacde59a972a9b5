# Sourced after ../tables/convert.sh: what the conversions of Llama-3.2-1B say of their own.

own HF_MODEL_PATH ./model_from_hf/llama32-hf/
own MG_MODEL_PATH ./model_weights/llama32-mcore/
own LORA_PATH ./ckpt/llama32_lora
own MERGED_PATH ./model_weights/llama32_lora2mcore
own MODEL_TYPE_HF llama2
