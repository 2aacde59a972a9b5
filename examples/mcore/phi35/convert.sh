# Sourced after ../tables/convert.sh: what the conversions of Phi-3.5-mini say of their own.

own HF_MODEL_PATH ./model_from_hf/Phi-3.5-mini-instruct/
own MG_MODEL_PATH ./model_weights/phi35_mini_mcore/
own LORA_PATH ./ckpt/phi35_mini_lora
own MERGED_PATH ./model_weights/phi35_mini_lora2mcore
own MODEL_TYPE_HF phi3.5
