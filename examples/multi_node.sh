#!/usr/bin/env bash
# Two "nodes" on this machine: two torchruns that share no files, then the same layout on one node: the same losses.
#
#   MODEL=DIR DATA=PREFIX examples/multi_node.sh
#
#   MODEL=DIR             a Hugging Face folder
#   DATA=PREFIX           prepared rows (preprocess_data.py --output-prefix)
#   OUT=multi_node        where everything is written; what an earlier run left there is replaced
#   RDZV=static           how the nodes meet: static (--node-rank, --master-addr) or c10d (elastic)
#   NPROC=1               processes of each node
#   TRAIN_ITERS=4         steps; half of them are done again from what the nodes saved by themselves
#
# Arguments are given to posttrain_gpt.py, as --tensor-model-parallel-size 2.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program() { if [[ -x $root/.venv/bin/$1 ]]; then echo "$root/.venv/bin/$1"; else echo "$1"; fi; }
python=${PYTHON:-$(program python)}
: "${MODEL:?name a Hugging Face folder: MODEL=DIR}" "${DATA:?name prepared rows: DATA=PREFIX}"
OUT=${OUT:-multi_node} RDZV=${RDZV:-static} NPROC=${NPROC:-1} TRAIN_ITERS=${TRAIN_ITERS:-4}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -rf "$OUT"
mkdir -p "$OUT"

port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
half=$((TRAIN_ITERS / 2))
job=(--load "$MODEL" --data-path "$DATA" --lora-r 4 --seq-length 48 --micro-batch-size 1 --global-batch-size 4 --lr 1e-2
    --lr-warmup-iters 0 --lr-decay-style constant --train-iters "$TRAIN_ITERS" --save-interval "$half"
    --distributed-timeout-minutes 2 "$@")

# node NUMBER PORT FLAG ...: a torchrun of NPROC processes, with a folder of its own.
node() {
    local rendezvous=(--node-rank "$1" --master-addr 127.0.0.1 --master-port "$2")
    [[ $RDZV == static ]] || rendezvous=(--rdzv-backend c10d --rdzv-endpoint "127.0.0.1:$2" --rdzv-id "$OUT")
    "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node "$NPROC" "${rendezvous[@]}" \
        "$root/posttrain_gpt.py" "${job[@]}" --save "$OUT/node$1" --no-shared-storage "${@:3}"
}

# both FLAG ...: the two nodes at once; fails where one of them does.
both() {
    local address
    address=$(port)
    node 0 "$address" "$@" & local first=$!
    node 1 "$address" "$@" & local second=$!
    local status=0
    wait "$first" || status=$?
    wait "$second" || status=$?
    return "$status"
}

echo "=== two nodes ($RDZV), $TRAIN_ITERS steps"
both
echo "=== the second half again, from what each node kept"
cp "$OUT/node0/metrics.jsonl" "$OUT/two_nodes.jsonl" 2>/dev/null || cp "$OUT/node1/metrics.jsonl" "$OUT/two_nodes.jsonl"
for number in 0 1; do
    rm -r "$OUT/node$number/$(printf 'iter_%07d' "$TRAIN_ITERS")"
    echo "$half" >"$OUT/node$number/latest_checkpointed_iteration.txt"
done
both --resume auto
echo "=== one node of the same layout"
"$python" -m torch.distributed.run --standalone --nproc-per-node $((2 * NPROC)) "$root/posttrain_gpt.py" "${job[@]}" \
    --save "$OUT/one_node"

"$python" - "$OUT" <<'EOF'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])


def losses(path: Path) -> dict[int, float]:
    records = map(json.loads, path.read_text().splitlines())
    return {record["iteration"]: record["lm_loss"] for record in records}


# The elastic rendezvous may make the other node the first one when they start again.
written = max(out.glob("node*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
two_nodes = losses(out / "two_nodes.jsonl")
resumed = {**two_nodes, **losses(written)}
runs = [list(run.values()) for run in (losses(out / "one_node" / "metrics.jsonl"), two_nodes, resumed)]
for step, (one, two, again) in enumerate(zip(*runs, strict=True), start=1):
    print(f"step {step}: one node {one:.9g}, two nodes {two:.9g}, resumed {again:.9g}")
kept = {
    node: sorted(str(p.relative_to(out / node)) for p in (out / node).glob("iter_*/**/*") if p.is_file())
    for node in ("node0", "node1")
}
if kept["node0"] != kept["node1"]:
    sys.exit("error: the nodes do not hold the same checkpoints")
if not runs[0] == runs[1] == runs[2]:
    sys.exit("error: the losses differ")
print("two nodes and one: the same losses; each node holds whole checkpoints")
EOF
