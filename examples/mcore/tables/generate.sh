# Sourced by the generating scripts: the flags of a generation job, and its start.
#
# NPROC (or NPUS_PER_NODE) processes on each of NNODES machines; TP x PP, and EP x ETP x PP, divide their number.
# TASK is greedy, do_sample or chat; PROMPT or PROMPT_FILE what is asked; LORA_LOAD= (empty) leaves the adapter out.

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generation_table() {
    words  --task                             TASK                          ""
    flag   --prompt                           PROMPT                        ""
    flag   --prompt-file                      PROMPT_FILE                   ""
    flag   --output-file                      OUTPUT_FILE                   ""
    switch --use-kv-cache                     USE_KV_CACHE                  1
    flag   --seq-length                       SEQ_LENGTH                    4096
    flag   --max-new-tokens                   MAX_NEW_TOKENS                256
    flag   --micro-batch-size                 MICRO_BATCH_SIZE              1
    flag   --global-batch-size                GLOBAL_BATCH_SIZE             ""
    flag   --top-k                            TOP_K                         ""
    flag   --top-p                            TOP_P                         ""
    flag   --temperature                      TEMPERATURE                   ""
    flag   --seed                             SEED                          ""
}

# generate DEFAULT_PORT ARGUMENT ...: the job.
generate() {
    layout_table
    model_table
    adapter_table
    generation_table
    run_distributed "$1" inference.py "${@:2}"
}
