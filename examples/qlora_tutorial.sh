#!/usr/bin/env bash
# QLoRA step by step, as its tutorials have it: load in 4 bits, add an adapter, train, save, merge, generate.
#
#   examples/qlora_tutorial.sh
#
#   HF_MODEL=DIR          your own Hugging Face folder instead of SmolLM2-135M-Instruct
#   DATA=FILE             your own Alpaca-style rows instead of 999 of Alpaca's
#   OUT=qlora_tutorial    where everything is written; what an earlier run left there is replaced
#   PROMPT=TEXT           what the model is asked before and after
#   NPROC=1               processes; with TP=2 NPROC=2 each holds half of every matrix (SmolLM2 itself cannot be cut)
#   TRAIN_ITERS, GRADIENT_ACCUMULATION_STEPS, LR, SEQ_LENGTH, MAX_NEW_TOKENS, BF16=1
#
# Minutes on two cores. What a line is called in transformers, PEFT and TRL stands beside it.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program() { if [[ -x $root/.venv/bin/$1 ]]; then echo "$root/.venv/bin/$1"; else echo "$1"; fi; }
python=${PYTHON:-$(program python)}
torchrun=${TORCHRUN:-$(program torchrun)}

step() { printf '\n=== %s\n' "$*"; }

# distributed SCRIPT ARGUMENT ...: over NPROC processes of this machine.
distributed() {
    if ((NPROC == 1)); then
        "$python" "$root/$1" "${@:2}"
    else
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$torchrun" --standalone --nproc_per_node "$NPROC" "$root/$1" "${@:2}"
    fi
}

# ask FILE FLAG ...: the answer to PROMPT goes to FILE.
ask() {
    rm -f "$1"
    distributed inference.py "${@:2}" "${precision[@]}" --tensor-model-parallel-size "$TP" \
        --tokenizer-name-or-path "$HF_MODEL" --hf-chat-template --task greedy --prompt "$PROMPT" \
        --max-new-tokens "$MAX_NEW_TOKENS" --output-file "$1"
}

NPROC=${NPROC:-1} TP=${TP:-1}
OUT=$(realpath -m "${OUT:-qlora_tutorial}")
PROMPT=${PROMPT:-Generate a tagline for a pizza delivery company that conveys quality and trust in a single line}
SEQ_LENGTH=${SEQ_LENGTH:-512}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-48}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-4}
data_parallel=$((NPROC / TP))
precision=()
[[ ${BF16:-0} == 0 ]] || precision=(--bf16)
mkdir -p "$OUT"
SECONDS=0

if [[ -z ${HF_MODEL:-} || -z ${DATA:-} ]]; then
    step "Fetching the model and the rows (once)"
    assets=$("$python" "$root/tools/fetch_assets.py")
    : "${HF_MODEL:=$(sed -n 's/^MODEL=//p' <<<"$assets")}"
    : "${DATA:=$(sed -n 's/^DATA=//p' <<<"$assets")/alpaca_en_demo.json}"
fi

step "Preparing the rows of $(basename "$DATA")"
"$python" "$root/preprocess_data.py" --input "$DATA" --output-prefix "$OUT/rows" --overwrite \
    --tokenizer-name-or-path "$HF_MODEL" --hf-chat-template --seq-length "$SEQ_LENGTH"

# BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True). The compute dtype
# is float32 unless BF16=1. No file is converted: each process quantises what it reads.
quantised=(--qlora --quant-type nf4 --quant-double)

step "Asking the model in 4 bits, before"
ask "$OUT/before.jsonl" --load "$HF_MODEL" "${quantised[@]}"

adapter=(
    --lora-r 64                                 # LoraConfig(r=64,
    --lora-alpha 32                             #            lora_alpha=32,
    --lora-dropout 0.1                          #            lora_dropout=0.1,
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 #   target_modules="all-linear")
)
training=(
    --micro-batch-size 1                        # per_device_train_batch_size=1
    --global-batch-size $((GRADIENT_ACCUMULATION_STEPS * data_parallel)) # gradient_accumulation_steps=4
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 # gradient_checkpointing=True
    --paged-optimizer                           # optim="paged_adamw_32bit"
    --lr "${LR:-2e-4}"                          # learning_rate=2e-4
    --lr-decay-style cosine                     # lr_scheduler_type="cosine"
    --lr-warmup-fraction 0.03                   # warmup_ratio=0.03
    --clip-grad 0.3                             # max_grad_norm=0.3
    --weight-decay 0.001                        # weight_decay=0.001
    --train-iters "${TRAIN_ITERS:-30}"          # max_steps=30
    --split 97,3,0 --eval-interval 15 --eval-iters 2
)

step "Training an adapter on the frozen 4-bit model"
distributed posttrain_gpt.py --stage sft --load "$HF_MODEL" "${quantised[@]}" "${adapter[@]}" "${training[@]}" \
    "${precision[@]}" --tensor-model-parallel-size "$TP" --tokenizer-name-or-path "$HF_MODEL" \
    --data-path "$OUT/rows" --seq-length "$SEQ_LENGTH" --variable-seq-lengths --save "$OUT/run" --overwrite

step "The adapter is saved: a PEFT folder, for this model in 4 bits or in full (PeftModel.from_pretrained)"
ls "$OUT/run/adapter/"

step "Asking the model in 4 bits with its adapter"
ask "$OUT/adapter.jsonl" --load "$HF_MODEL" "${quantised[@]}" --lora-load "$OUT/run"

step "Merging the adapter into the original weights (merge_and_unload)"
"$python" "$root/convert_ckpt.py" --load-model-type hf --save-model-type hf --load-dir "$HF_MODEL" \
    --lora-load "$OUT/run" --save-dir "$OUT/merged" --overwrite

step "Asking the merged model"
merged=$OUT/merged
[[ ! -d $merged/mg2hf ]] || merged=$merged/mg2hf
ask "$OUT/merged.jsonl" --load "$merged"

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
for name in before adapter merged; do
    printf '%-8s %s\n' "$name:" "$("$python" -c '
import json, sys
print(json.loads(open(sys.argv[1]).readline())["text"].strip().replace("\n", " "))' "$OUT/$name.jsonl")"
done
printf '\nPEFT adapter: %s\nMerged model: %s\n' "$OUT/run/adapter" "$merged"
printf 'To chat: %s inference.py --task chat --load %s --qlora --lora-load %s\n' "$python" "$HF_MODEL" "$OUT/run"
