#!/usr/bin/env bash
# Makes .venv in the root of the project and installs the package there, editable, with the named extras.
#
#   tools/setup.sh [EXTRA ...]      default: dev
#
# PYTHON names the interpreter; else the newest of python3.13, 3.12, 3.11 that works is taken. Nothing is done when
# .venv is complete already (a stamp, written last, holds a hash of pyproject.toml and of this folder's path). An
# interrupted run is taken up where it was. A torch that suits is kept: one in .venv, or one that the interpreter
# itself brings (a vendor's container), in which case .venv sees the interpreter's packages.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "${*:-dev}")
stamp=.venv/.complete-$extras
readonly newest_torch=2.13.0
readonly -a candidates=(python3.13 python3.12 python3.11 python3 python)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

hash_of_project() { { cat pyproject.toml; pwd; } | sha256sum | cut -d' ' -f1; }

# Whether interpreter $1 runs (a version manager's shim may not), is 3.11 to 3.13, and can make environments.
is_suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "does not run"; }

find_python() {
    local name found=""
    if [[ -n ${PYTHON:-} ]]; then
        is_suitable "$PYTHON" && { echo "$PYTHON"; return; }
        die "PYTHON=$PYTHON ($(version_of "$PYTHON")) does not suit: Python 3.11 to 3.13 with its venv module is needed"
    fi
    for name in "${candidates[@]}"; do
        command -v "$name" >/dev/null || continue
        is_suitable "$name" && { command -v "$name"; return; }
        found+=" $name ($(version_of "$name"))"
    done
    die "no suitable Python: found${found:- none}, and 3.11 to 3.13 with its venv module is needed;" \
        "install one (on Debian: python3.11-venv), or name it: make setup PYTHON=/path/to/python"
}

# Whether interpreter $1 has a torch in the range that pyproject.toml allows.
has_torch() {
    "$1" - <<'EOF' 2>/dev/null
import re
import sys
from importlib.metadata import version

bounds = re.search(r'"torch>=([\d.]+),<([\d.]+)"', open("pyproject.toml").read()).groups()
low, high = (tuple(map(int, bound.split("."))) for bound in bounds)
sys.exit(not low <= tuple(map(int, version("torch").split(".")[:2])) < high)
EOF
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Refuses when the folder $1 has fewer than $2 GB free.
check_space() {
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { printf "%.1f", $4 * 1024 / 1e9 }')
    awk "BEGIN { exit !($free >= $2) }" ||
        die "$(realpath "$1") has $free GB free, and the installation needs about $2 GB: free some${3:-}"
}

make_environment() {
    local python options=()
    python=$(find_python)
    # Only from an interpreter itself: of another environment's packages a new one sees nothing.
    if has_torch "$python" && "$python" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        options=(--system-site-packages)
    fi
    say "making .venv with $python ($(version_of "$python"))"
    "$python" -m venv --clear "${options[@]}" .venv || die "$python could not make .venv"
}

# pip install "$@", quietly; what went wrong is left in $pip_errors.
install() {
    local log status=0
    log=$(mktemp)
    .venv/bin/python -m pip install --progress-bar off "$@" >"$log" 2>&1 || status=$?
    pip_errors=$(grep -E '^ERROR|^error' "$log" | tail -3 || true)
    if grep -q 'No space left on device' "$log"; then
        rm -f "$log"
        die "the disk is full: make room for .venv and ${TMPDIR:-/tmp}; make setup then goes on from here"
    fi
    rm -f "$log"
    return "$status"
}

install_torch() {
    has_torch .venv/bin/python && return
    if ! has_nvidia_gpu; then
        say "installing torch $newest_torch for CPU"
        # The CPU build carries this label where an index has several builds; elsewhere there is but one.
        install "torch==$newest_torch+cpu" && return
        say "no build named for CPU: taking what the index gives (on Linux that may be several GB of CUDA" \
            "libraries; an index with PyTorch's CPU builds in pip's settings avoids them)"
        check_space . 12
        install "torch==$newest_torch" && return
    fi
    say "installing torch"
    install "$(grep -oE 'torch>=[0-9.]+,<[0-9.]+' pyproject.toml | head -1)" ||
        die "torch could not be installed: $pip_errors"
}

if [[ -f $stamp && $(<"$stamp") == "$(hash_of_project)" ]] && .venv/bin/python -c '' 2>/dev/null; then
    [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of .venv/bin/python)" ]] && exit 0
fi
if [[ -n ${PYTHON:-} && -x .venv/bin/python && $(version_of "$PYTHON") != "$(version_of .venv/bin/python)" ]]; then
    die ".venv has Python $(version_of .venv/bin/python), not that of PYTHON=$PYTHON; remove .venv first"
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    check_space . "$(has_nvidia_gpu && echo 12 || echo 3)"
    make_environment
fi
check_space "${TMPDIR:-/tmp}" 1 ", or name another folder with TMPDIR"
install_torch
say "installing mindspeed_lora[$extras]"
install --editable ".[$extras]" ||
    die "mindspeed_lora[$extras] could not be installed; once mended, make setup goes on from here: $pip_errors"
# An installation that was cut off can leave a package half written, which pip takes for whole.
.venv/bin/python -c 'import megatron.core, numpy, safetensors, torch, transformers' >/dev/null 2>&1 ||
    die ".venv is damaged; remove it and run make setup again"
# pip's own torchrun names this folder's path, which may change; that of the interpreter does not see .venv.
printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m torch.distributed.run "$@"\n' >.venv/bin/torchrun
chmod +x .venv/bin/torchrun
hash_of_project >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
say "ready: .venv ($(version_of .venv/bin/python), torch $(.venv/bin/python -c 'import torch; print(torch.__version__)'))"
