# Sourced by the example scripts: builds a command line from a table, and runs it.
#
# A script is a table of its flags, one a line:
#
#     flag   --micro-batch-size    MICRO_BATCH_SIZE  4
#            the flag              its variable      the value where the variable is not set
#
# Families share tables (tables/*.sh); a script then says its own values before the table is read:
#
#     own    MICRO_BATCH_SIZE  4
#
# A variable that is set but empty leaves its flag out: NUM_LAYERS= lets the checkpoint tell the number of layers.
# A switch is given when its variable is neither empty nor 0. The script's own arguments come last and win.
#
# PYTHON and TORCHRUN name the programs; else those of .venv beside the examples are taken, else those on PATH.
# OMP_NUM_THREADS, unless set, shares the machine's cores among its processes (torchrun alone would give each one).

set -euo pipefail

ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ARGUMENTS=()
LAUNCHER=()

# own VARIABLE VALUE: this script's value of a line of a shared table, where the variable is not set.
own() {
    [[ -n ${!1+set} ]] || printf -v "$1" %s "$2"
}

# flag NAME VARIABLE DEFAULT: one value, which may hold blanks.
flag() {
    local value=${!2-$3}
    [[ -z $value ]] || ARGUMENTS+=("$1" "$value")
}

# words NAME VARIABLE DEFAULT: several values, split at blanks.
words() {
    local values
    read -ra values <<<"${!2-$3}"
    ((${#values[@]} == 0)) || ARGUMENTS+=("$1" "${values[@]}")
}

# switch NAME VARIABLE DEFAULT: a flag without a value.
switch() {
    local value=${!2-$3}
    [[ -z $value || $value == 0 ]] || ARGUMENTS+=("$1")
}

# A vendor's accelerator needs its environment in every process; elsewhere there is no such file.
source_vendor_environment() {
    local file=${ASCEND_ENVIRONMENT:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
    if [[ -f $file ]]; then
        set +eu
        # shellcheck source=/dev/null
        source "$file"
        set -eu
    fi
}

# The program $1 of .venv, else of PATH.
program() {
    if [[ -x $ROOT/.venv/bin/$1 ]]; then echo "$ROOT/.venv/bin/$1"; else echo "$1"; fi
}

# share_cores PROCESSES: threads for each of so many processes on this machine.
share_cores() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

# run_alone SCRIPT ARGUMENT ...: in one process.
run_alone() {
    source_vendor_environment
    local python=${PYTHON:-$(program python)} script=$ROOT/$1
    shift
    exec "$python" "$script" "${ARGUMENTS[@]}" "$@"
}

# run_distributed DEFAULT_PORT SCRIPT ARGUMENT ...: over NNODES machines of NPROC (or NPUS_PER_NODE) processes.
# Where neither is set, there are as many processes as one copy of the model needs.
run_distributed() {
    source_vendor_environment
    local nnodes=${NNODES:-1} model_parallel=$((${TP:-1} * ${CP:-1} * ${PP:-1}))
    local expert_parallel=$((${EP:-1} * ${ETP:-1} * ${PP:-1}))
    ((expert_parallel <= model_parallel)) || model_parallel=$expert_parallel
    local nproc=${NPROC:-${NPUS_PER_NODE:-$(((model_parallel + nnodes - 1) / nnodes))}}
    LAUNCHER=(
        --nproc_per_node "$nproc"
        --nnodes "$nnodes"
        --node_rank "${NODE_RANK:-0}"
        --master_addr "${MASTER_ADDR:-localhost}"
        --master_port "${MASTER_PORT:-$1}"
    )
    share_cores "$nproc"
    local torchrun=${TORCHRUN:-$(program torchrun)} script=$ROOT/$2
    shift 2
    exec "$torchrun" "${LAUNCHER[@]}" "$script" "${ARGUMENTS[@]}" "$@"
}
