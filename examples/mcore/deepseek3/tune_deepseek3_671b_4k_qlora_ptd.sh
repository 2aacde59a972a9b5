#!/usr/bin/env bash
# Fine-tunes DeepSeek-V3 with QLoRA on attention and all experts, PP 8 x EP 4 on 4 machines of 8 devices.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore-nf4/ DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/deepseek3-bf16/ CKPT_SAVE_DIR=./ckpt/deepseek3_qlora \
#       examples/mcore/deepseek3/tune_deepseek3_671b_4k_qlora_ptd.sh [more flags]
#
# CKPT_LOAD_DIR is what ckpt_convert_deepseek3_hf2mcore_qlora.sh wrote, or any other checkpoint: a plain one is
# quantised while it is read. Flags, their variables and values: ../tables/model.sh, ../tables/tune.sh; what is said
# here and in model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/tune.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/tune.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own NNODES 4
own PP 8
own EP 4
own NUM_LAYER_LIST 7,7,7,8,8,8,8,8
own QLORA 1
own GLOBAL_BATCH_SIZE 128
own TRAIN_ITERS 200
own LR 1.0e-5
own MIN_LR 1.0e-7
own LR_WARMUP_ITERS 1
own WEIGHT_DECAY 1e-2
own ADAM_BETA2 0.999
own INIT_METHOD_STD 0.02
own INITIAL_LOSS_SCALE 65536
own MOE_ROUTER_LOAD_BALANCING_TYPE noaux_tc
own SEQ_AUX 1
own DISTRIBUTED_TIMEOUT_MINUTES 120
own NO_SHARED_STORAGE 1
own NO_SAVE_OPTIM 1
own NO_SAVE_RNG 1
own SAVE_INTERVAL 50

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

tune 6000 "$@"
