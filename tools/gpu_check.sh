#!/usr/bin/env bash
# Tests and measures the package on one CUDA GPU, without a package index; leaves one JSON.
#
#   WHEELS=/folder tools/gpu_check.sh            needs python3 (3.11 to 3.13) that brings torch 2.11 or newer with CUDA
#
#   WHEELS   folder of wheels: whatever of pyproject.toml's dependencies the interpreter lacks (megatron-core 0.16.1
#            always; often sentencepiece, pyarrow, tensorboard, matplotlib), pytest, pytest-timeout, peft, and for the
#            comparison trl and datasets. On a machine with an index:
#              pip download --dest wheels --no-deps megatron-core==0.16.1
#              pip download --dest wheels sentencepiece pyarrow tensorboard matplotlib pytest pytest-timeout trl datasets
#            leaving out of the second line what pulls in torch: the interpreter's own is used.
#   PYTHON   the interpreter (default: python3)
#   OUT      where the JSON goes (default: ./gpu_check.json)
#   BENCH    flags of benchmarks/train_vs_trl_gpu.py, or "no" to leave it out (default: all shapes)
#
# Exit status: 0 all well, 1 a test failed or the comparison disagreed, 2 it could not begin.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() { printf 'error: %s\n' "$*" >&2; exit 2; }

python=${PYTHON:-python3}
out=${OUT:-$PWD/gpu_check.json}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

command -v "$python" >/dev/null || refuse "PYTHON=$python: no such interpreter; name one that brings torch with CUDA"
"$python" -c 'import torch' 2>/dev/null || refuse "$python has no torch; name with PYTHON an interpreter that brings torch with CUDA"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    refuse "torch sees no CUDA GPU on this machine; gpu_check.sh needs one"
[[ -n ${WHEELS:-} ]] || refuse "WHEELS is not set; give the folder of wheels that this script's head describes"
compgen -G "$WHEELS/megatron_core-0.16.1*.whl" >/dev/null ||
    refuse "WHEELS=$WHEELS holds no megatron_core-0.16.1 wheel; this script's head tells what must be there"

"$python" -m venv --system-site-packages "$work/venv" || refuse "$python cannot make a virtual environment; install its venv module"
readonly run="$work/venv/bin/python"
mapfile -t wanted < <("$run" tools/gpu_check_report.py --requirements)
"$run" -m pip install --quiet --no-index --find-links "$WHEELS" "${wanted[@]}" >"$work/pip.log" 2>&1 ||
    refuse "WHEELS=$WHEELS does not suffice: $(grep -m1 -i 'error' "$work/pip.log" || tail -n1 "$work/pip.log")"
alone=()
"$run" -m pip install --quiet --no-index --find-links "$WHEELS" trl datasets >"$work/pip_bench.log" 2>&1 || {
    printf 'notice: trl and datasets cannot be installed from %s; ours is measured alone\n' "$WHEELS" >&2
    alone=(--alone)
}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
status=0
"$run" -m pytest tests/gpu -m gpu --junit-xml "$work/tests.xml" || status=1
if [[ ${BENCH:-} != no ]]; then
    # shellcheck disable=SC2086  # BENCH is a list of words
    "$run" benchmarks/train_vs_trl_gpu.py --json "$work/bench.json" "${alone[@]}" ${BENCH:-} || status=1
fi
"$run" benchmarks/merge_or_split.py --json "$work/merge.json" || status=1
"$run" tools/gpu_check_report.py --tests "$work/tests.xml" --benchmark "$work/bench.json" \
    --merge-or-split "$work/merge.json" --out "$out"
printf 'written: %s\n' "$out" >&2
exit "$status"
