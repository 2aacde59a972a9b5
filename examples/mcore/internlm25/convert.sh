# Sourced after ../tables/convert.sh: what the conversions of InternLM2.5-7B say of their own.

own HF_MODEL_PATH ./model_from_hf/internlm25_7b_hf/
own MG_MODEL_PATH ./model_weights/internlm25-7b-mcore-tp8-pp1/
own LORA_PATH ./ckpt/internlm25_lora
own MERGED_PATH ./model_weights/internlm25_lora2mcore
own MODEL_TYPE_HF internlm2
