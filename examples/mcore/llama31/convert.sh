# Sourced after ../tables/convert.sh: what the conversions of Llama-3.1-8B say of their own.

own HF_MODEL_PATH ./model_from_hf/llama31-hf/
own MG_MODEL_PATH ./model_weights/llama31-mcore/
own LORA_PATH ./ckpt/llama31_lora
own MERGED_PATH ./model_weights/llama31_lora2mcore
own MODEL_TYPE_HF llama2
