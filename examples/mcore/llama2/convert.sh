# Sourced after ../tables/convert.sh: what the conversions of Llama-2-7B say of their own.

own HF_MODEL_PATH ./model_from_hf/llama-2-7b-hf/
own MG_MODEL_PATH ./model_weights/Llama2-mcore/
own LORA_PATH ./ckpt/llama-2-7b-lora
own MERGED_PATH ./model_weights/llama2-7b-lora2mcore
own MODEL_TYPE_HF llama2
own LORA_R 16
own LORA_ALPHA 32
