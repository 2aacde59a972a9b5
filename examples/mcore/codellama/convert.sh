# Sourced after ../tables/convert.sh: what the conversions of CodeLlama-34B say of their own.

own HF_MODEL_PATH ./model_from_hf/Codellama-hf/
own MG_MODEL_PATH ./model_weights/Codellama-mcore/
own LORA_PATH ./ckpt/codellama_lora
own MERGED_PATH ./model_weights/codellama_lora2mcore
own MODEL_TYPE_HF llama2
