# Sourced by the generating scripts of models with experts: the flags of a generation job, and its start.
#
# NPROC (or NPUS_PER_NODE, 8) processes on each of NNODES machines; TP x PP, and EP x ETP x PP, divide their number.

# shellcheck source=model_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/model_experts.sh"

generation_table() {
    if [[ -n ${LORA_LOAD-} ]]; then
        flag   --lora-load                    LORA_LOAD                     ""
        flag   --lora-r                       LORA_R                        ""
        flag   --lora-alpha                   LORA_ALPHA                    ""
        switch --lora-fusion                  LORA_FUSION                   1
        words  --lora-target-modules          LORA_TARGET_MODULES           ""
    fi
    switch --qlora                            QLORA                         0
    words  --task                             TASK                          ""
    flag   --prompt                           PROMPT                        ""
    flag   --prompt-file                      PROMPT_FILE                   ""
    flag   --output-file                      OUTPUT_FILE                   ""
    switch --use-kv-cache                     USE_KV_CACHE                  1
    flag   --seq-length                       SEQ_LENGTH                    4096
    flag   --max-new-tokens                   MAX_NEW_TOKENS                256
    flag   --micro-batch-size                 MICRO_BATCH_SIZE              1
    flag   --top-k                            TOP_K                         ""
    flag   --top-p                            TOP_P                         ""
    flag   --temperature                      TEMPERATURE                   ""
    flag   --seed                             SEED                          ""
}

# generate DEFAULT_PORT ARGUMENT ...: the job.
generate() {
    own NPROC "${NPUS_PER_NODE:-8}"
    layout_table
    model_table
    generation_table
    run_distributed "$1" inference.py "${@:2}"
}
