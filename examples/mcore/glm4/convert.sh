# Sourced after ../tables/convert.sh: what the conversions of GLM-4-9B say of their own.

own HF_MODEL_PATH ./model_from_hf/glm4_hf
own MG_MODEL_PATH ./model_weights/glm4_mcore
own LORA_PATH ./ckpt/glm4_lora
own MERGED_PATH ./model_weights/glm4_lora2mcore
own MODEL_TYPE_HF chatglm3
