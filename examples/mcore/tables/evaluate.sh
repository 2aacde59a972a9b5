# Sourced by the evaluating scripts: the flags of an evaluation job, and its start.
#
# NPROC (or NPUS_PER_NODE) processes on each of NNODES machines; TP x PP, and EP x ETP x PP, divide their number.
# TASK is mmlu, cmmlu, ceval, gsm8k, boolq, bbh, agieval, human_eval …, DATA_PATH its folder; LORA_LOAD adds an
# adapter to the model, LORA_LOAD= (empty) leaves it out. ../../../docs/evaluation.md tells tasks and folders.

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluation_table() {
    # One token is a letter; a text is as long as its benchmark needs, unless the variable says how long.
    [[ ! " ${TASK-} " =~ \ (gsm8k|bbh|agieval|human_eval|needlebench)\  ]] || own MAX_NEW_TOKENS ""
    words  --task                             TASK                          mmlu
    flag   --task-data-path                   DATA_PATH                     "your data path/mmlu/test/"
    flag   --output-dir                       OUTPUT_DIR                    ""
    flag   --evaluation-batch-size            EVALUATION_BATCH_SIZE         1
    flag   --max-new-tokens                   MAX_NEW_TOKENS                1
    flag   --max-eval-samples                 MAX_EVAL_SAMPLES              ""
    flag   --eval-language                    EVAL_LANGUAGE                 ""
    switch --no-chat-template                 NO_CHAT_TEMPLATE              0
    switch --alternative-prompt               ALTERNATIVE_PROMPT            0
    switch --chain-of-thought                 CHAIN_OF_THOUGHT              0
    switch --allow-code-execution             ALLOW_CODE_EXECUTION          0
    switch --broadcast                        BROADCAST                     0
    flag   --seq-length                       SEQ_LENGTH                    4096
    flag   --micro-batch-size                 MICRO_BATCH_SIZE              1
    flag   --seed                             SEED                          42
}

# evaluate DEFAULT_PORT ARGUMENT ...: the job.
evaluate() {
    layout_table
    model_table
    adapter_table
    evaluation_table
    run_distributed "$1" evaluation.py "${@:2}"
}
