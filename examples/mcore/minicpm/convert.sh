# Sourced after ../tables/convert.sh: what the conversions of MiniCPM-2B say of their own.

own HF_MODEL_PATH ./model_from_hf/MiniCPM-2B-sft-bf16/
own MG_MODEL_PATH ./model_weights/MiniCPM-2B-sft-mcore/
own LORA_PATH ./ckpt/minicpm_lora
own MERGED_PATH ./model_weights/minicpm_lora2mcore
own MODEL_TYPE_HF minicpm
