# Sourced by the scripts that prepare data: instruction rows (JSON, JSONL, Parquet, CSV, or a folder of them) become
# the indexed data set of training. HF_CHAT_TEMPLATE=1 PROMPT_TYPE= takes the tokenizer's own chat template.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

# prepare ARGUMENT ...: the job.
prepare() {
    own OUTPUT_PREFIX ./finetune_dataset/alpaca
    flag   --input                            INPUT                         ./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet
    flag   --tokenizer-name-or-path           TOKENIZER_PATH                ""
    flag   --output-prefix                    OUTPUT_PREFIX                 ""
    flag   --workers                          WORKERS                       4
    flag   --log-interval                     LOG_INTERVAL                  1000
    flag   --tokenizer-type                   TOKENIZER_TYPE                PretrainedFromHF
    switch --tokenizer-not-use-fast           TOKENIZER_NOT_USE_FAST        0
    switch --overwrite-cache                  OVERWRITE_CACHE               0
    flag   --handler-name                     HANDLER_NAME                  AlpacaStyleInstructionHandler
    flag   --prompt-type                      PROMPT_TYPE                   ""
    switch --hf-chat-template                 HF_CHAT_TEMPLATE              0
    flag   --map-keys                         MAP_KEYS                      ""
    flag   --seq-length                       SEQ_LENGTH                    ""
    flag   --overlong                         OVERLONG                      ""
    switch --pack                             PACK                          0
    switch --append-eod                       APPEND_EOD                    0
    run_alone preprocess_data.py "$@"
}
