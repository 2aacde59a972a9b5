#!/usr/bin/env bash
# The whole job on this machine, by the example scripts: prepare rows, shard a model, ask it, fine-tune it with LoRA,
# merge and export the adapter, and ask again.
#
#   tools/demo.sh
#
#   TP=2 PP=1            the layout: TP x PP processes (TP=1 PP=2 and TP=2 PP=2 work as well)
#   HF_MODEL=DIR         your own Hugging Face folder instead of SmolLM2-135M-Instruct
#   DATA=FILE            your own Alpaca-style rows instead of 999 of Alpaca's
#   OUT=demo_output      where everything is written; what an earlier demo left there is replaced
#   PROMPT=TEXT          what the model is asked before and after
#   TRAIN_ITERS, LR, GLOBAL_BATCH_SIZE, SEQ_LENGTH, … every other variable of the example scripts
#
# The last SPLIT rows of the file are held out; the loss on them is told before and after.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scripts=$root/examples/mcore/llama2
python=$root/.venv/bin/python

step() { printf '\n=== %s\n' "$*"; }

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# generate FILE ADAPTER: the answer to PROMPT goes to FILE; with ADAPTER empty, that of the base model.
generate() {
    rm -f "$1"
    OUTPUT_FILE=$1 LORA_LOAD=$2 CKPT_LOAD_DIR=$OUT/mcore TASK=greedy MASTER_PORT=$(free_port) \
        FP16=0 TOKENIZER_MODEL='' TOKENIZER_NOT_USE_FAST=0 SEQ_LENGTH='' MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE='' \
        "$scripts/generate_llama2_7b_lora_ptd.sh"
}

SECONDS=0
export TP=${TP:-2} PP=${PP:-1}
OUT=$(realpath -m "${OUT:-demo_output}")
PROMPT=${PROMPT:-Generate a tagline for a pizza delivery company that conveys quality and trust in a single line}
export PROMPT MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
mkdir -p "$OUT"

if [[ -z ${HF_MODEL:-} || -z ${DATA:-} ]]; then
    step "Fetching the model and the rows (once)"
    assets=$("$python" "$root/tools/fetch_assets.py")
    # The head-padded variant: 12 query and 4 key/value heads can be cut in two, 9 and 3 cannot.
    : "${HF_MODEL:=$(sed -n 's/^PADDED_MODEL=//p' <<<"$assets")}"
    : "${DATA:=$(sed -n 's/^DATA=//p' <<<"$assets")/alpaca_en_demo.json}"
fi

# What the checkpoint tells is left out; so are the settings of Llama-2-7B that a small model has otherwise.
export NUM_LAYERS='' HIDDEN_SIZE='' FFN_HIDDEN_SIZE='' NUM_ATTENTION_HEADS='' MAX_POSITION_EMBEDDINGS='' \
    ROTARY_BASE='' NORM_EPSILON='' VOCAB_SIZE='' UNTIE=0 DISABLE_BIAS_LINEAR=0 MODEL_TYPE_HF='' BF16=0 \
    TOKENIZER_PATH=$HF_MODEL OVERWRITE=1
if [[ -z ${PROMPT_TYPE:-} ]]; then
    export PROMPT_TYPE='' HF_CHAT_TEMPLATE=1
fi
export SEQ_LENGTH=${SEQ_LENGTH:-512}

step "Preparing the rows of $(basename "$DATA")"
INPUT=$DATA OUTPUT_PREFIX=$OUT/data/rows WORKERS=2 "$scripts/data_convert_llama2_instruction.sh"

step "Cutting $(basename "$HF_MODEL") into TP $TP x PP $PP shards"
HF_MODEL_PATH=$HF_MODEL TOKENIZER_MODEL='' CKPT_SAVE_DIR=$OUT/mcore \
    "$scripts/ckpt_convert_llama2_hf2mcore.sh"

step "Asking the model before"
generate "$OUT/before.jsonl" ""

step "Fine-tuning over $((TP * PP)) processes"
CKPT_LOAD_DIR=$OUT/mcore CKPT_SAVE_DIR=$OUT/run DATA_PATH=$OUT/data/rows MASTER_PORT=$(free_port) \
    TRAIN_ITERS=${TRAIN_ITERS:-20} LR=${LR:-5e-4} MIN_LR=${MIN_LR:-5e-5} LR_WARMUP_FRACTION=0.1 WEIGHT_DECAY=0.01 \
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8} SPLIT=${SPLIT:-97,3,0} \
    EVAL_INTERVAL=${EVAL_INTERVAL:-10} EVAL_ITERS=${EVAL_ITERS:-3} SAVE_INTERVAL=${SAVE_INTERVAL:-10} \
    SP=${SP:-0} "$scripts/tune_llama2_7b_lora_ptd.sh"

step "Merging the adapter: a Megatron checkpoint"
CKPT_LOAD_DIR=$OUT/mcore LORA_LOAD=$OUT/run CKPT_SAVE_DIR=$OUT/merged_mcore \
    "$scripts/ckpt_convert_llama2_mg2mg_lora.sh"

step "Merging the adapter: a Hugging Face folder"
TP=1 PP=1 CKPT_LOAD_DIR=$OUT/mcore LORA_LOAD=$OUT/run CKPT_SAVE_DIR=$OUT/merged \
    "$scripts/ckpt_convert_llama2_mcore2hf_lora.sh"

step "Exporting the adapter alone"
TP=1 PP=1 CKPT_LOAD_DIR=$OUT/run CKPT_SAVE_DIR=$OUT/exported \
    "$scripts/ckpt_convert_llama2_lora2hf.sh"

step "Asking the model after"
generate "$OUT/after.jsonl" "$OUT/run"

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$python" "$root/tools/demo_summary.py" "$OUT"
