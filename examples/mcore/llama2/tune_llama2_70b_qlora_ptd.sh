#!/usr/bin/env bash
# Fine-tunes Llama-2-70B with QLoRA on attention and MLP, TP 2 on 2 devices.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama-2-70b-hf/ CKPT_SAVE_DIR=./ckpt/llama-2-70b-qlora \
#       examples/mcore/llama2/tune_llama2_70b_qlora_ptd.sh [more flags]
#
# QUANT_DOUBLE=1 quantises the scales too. CKPT_LOAD_DIR is what ckpt_convert_llama2_hf2mcore_qlora.sh wrote, or any
# other checkpoint: a plain one is quantised while it is read. Flags, their variables and values:
# ../tables/model.sh, ../tables/tune.sh; what is said here and in model-70b.sh and model.sh comes before; the rules:
# ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own TP 2
own QLORA 1
own LORA_FUSION 0
own GLOBAL_BATCH_SIZE 1
own LR 1.0e-6
own LR_WARMUP_FRACTION 0.00
own WEIGHT_DECAY 0.0
own INITIAL_LOSS_SCALE 1
own ADAM_BETA2 0.999
own ADAM_EPS 1e-8
own SEED 42
own LORA_R 16
own LORA_ALPHA 32
own PADDED_VOCAB_SIZE 32000
own EVAL_INTERVAL 10000
own USE_DISTRIBUTED_OPTIMIZER 0
own USE_FUSED_ROTARY_POS_EMB 0
own USE_FUSED_SWIGLU 0
own USE_FUSED_RMSNORM 0
own TOKENIZER_NOT_USE_FAST 1
own EXIT_ON_MISSING_CHECKPOINT 1

# shellcheck source=model-70b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-70b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6080 "$@"
