# Sourced after ../tables/convert.sh: what the conversions of Mistral-7B-Instruct-v0.2 say of their own.

own HF_MODEL_PATH ./model_from_hf/Mistral-hf/
own MG_MODEL_PATH ./model_weights/Mistral-mcore/
own LORA_PATH ./ckpt/mistral_lora
own MERGED_PATH ./model_weights/mistral_lora2mcore
own MODEL_TYPE_HF llama2
