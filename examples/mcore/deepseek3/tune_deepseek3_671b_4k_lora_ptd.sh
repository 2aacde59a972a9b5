#!/usr/bin/env bash
# Fine-tunes DeepSeek-V3 with LoRA on attention and all experts, PP 4 x EP 16 on 8 machines of 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/deepseek3-bf16/ CKPT_SAVE_DIR=./ckpt/deepseek3_lora \
#       examples/mcore/deepseek3/tune_deepseek3_671b_4k_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said here and in model.sh comes
# before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own NNODES 8
own PP 4
own EP 16
own GLOBAL_BATCH_SIZE 256
own TRAIN_ITERS 1000
own LR 1.0e-5
own MIN_LR 1.0e-7
own LR_WARMUP_ITERS 1
own WEIGHT_DECAY 1e-2
own ADAM_BETA2 0.999
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 65536
own MOE_ROUTER_LOAD_BALANCING_TYPE noaux_tc
own SEQ_AUX 1
own RECOMPUTE_GRANULARITY full
own RECOMPUTE_METHOD block
own RECOMPUTE_NUM_LAYERS 14
own DISTRIBUTED_TIMEOUT_MINUTES 120
own NO_SHARED_STORAGE 1
own NO_SAVE_OPTIM 1
own NO_SAVE_RNG 1
own SAVE_INTERVAL 100

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
