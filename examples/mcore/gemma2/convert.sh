# Sourced after ../tables/convert.sh: what the conversions of Gemma-2-9B say of their own.

own HF_MODEL_PATH ./model_from_hf/gemma2_hf/
own MG_MODEL_PATH ./model_weights/gemma2_mcore/
own LORA_PATH ./ckpt/gemma2_lora
own MERGED_PATH ./model_weights/gemma2_lora2mcore
own MODEL_TYPE_HF gemma2
