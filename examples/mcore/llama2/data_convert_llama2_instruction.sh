#!/usr/bin/env bash
# Turns instruction rows (JSON, JSONL, Parquet, CSV, or a folder of them) into the indexed data set of training.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/llama2/data_convert_llama2_instruction.sh [more flags]
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).
# HF_CHAT_TEMPLATE=1 PROMPT_TYPE= takes the tokenizer's own chat template.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

output_prefix=${OUTPUT_PREFIX-./finetune_dataset/alpaca}
mkdir -p "$(dirname "$output_prefix")"

flag   --input                   INPUT             ./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet
flag   --tokenizer-name-or-path  TOKENIZER_PATH    ./model_from_hf/llama-2-7b-hf/
flag   --output-prefix           OUTPUT_PREFIX     "$output_prefix"
flag   --workers                 WORKERS           4
flag   --log-interval            LOG_INTERVAL      1000
flag   --tokenizer-type          TOKENIZER_TYPE    PretrainedFromHF
switch --overwrite-cache         OVERWRITE_CACHE   1
flag   --handler-name            HANDLER_NAME      AlpacaStyleInstructionHandler
flag   --prompt-type             PROMPT_TYPE       llama2
switch --hf-chat-template        HF_CHAT_TEMPLATE  0
flag   --map-keys                MAP_KEYS          ""
flag   --seq-length              SEQ_LENGTH        ""
flag   --overlong                OVERLONG          ""
switch --append-eod              APPEND_EOD        0

run_alone preprocess_data.py "$@"
