# Sourced after ../tables/convert.sh: what the conversions of Yi-34B say of their own.

own HF_MODEL_PATH ./model_from_hf/Yi-hf/
own MG_MODEL_PATH ./model_weights/Yi-mcore/
own LORA_PATH ./ckpt/yi_lora
own MERGED_PATH ./model_weights/yi_lora2mcore
own MODEL_TYPE_HF llama2
