# Each target works alone from a bare clone: what it needs is made first.
#   PYTHON=/path/to/python3.12    the interpreter of .venv (default: the newest suitable one on PATH)
#   HF_MODEL=/path DATA=/path     the demo on your own model and rows; TP=, PP= its layout

.PHONY: help setup demo test lint format examples docs bench
.DEFAULT_GOAL := help

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup:  ## make .venv with everything that the other targets need
	@tools/setup.sh dev

demo: setup  ## fine-tune a real model over two ranks on this machine, in minutes
	@tools/demo.sh

test: lint  ## lint, then all tests but the slow ones, two files at a time
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

lint: setup  ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet . || { echo "error: run make format"; exit 1; }
	@.venv/bin/mypy

format: setup  ## let ruff format the sources
	@.venv/bin/ruff format .

examples: setup  ## write the example scripts from tools/example_families.toml
	@.venv/bin/python tools/make_examples.py

docs:  ## build the site of docs/ in build/site; a broken link is an error
	@tools/setup.sh docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

bench: setup  ## measure speed and memory beside TRL and PEFT; rewrites benchmarks/results and the tables
	@tools/setup.sh bench
	@.venv/bin/python benchmarks/train_vs_trl.py --steps 4 --repeats 2 --json benchmarks/results/train_vs_trl.json
	@.venv/bin/python benchmarks/train_vs_trl.py --profile --repeats 0 --sides ours:packed --json benchmarks/results/profile.json
	@.venv/bin/python benchmarks/tensor_parallel.py --json benchmarks/results/tensor_parallel.json
	@.venv/bin/python benchmarks/cclora.py --json benchmarks/results/cclora.json
	@.venv/bin/python benchmarks/moe.py --json benchmarks/results/moe.json
	@.venv/bin/python benchmarks/moe_overlap.py --json benchmarks/results/moe_overlap.json
	@.venv/bin/python benchmarks/qlora.py --json benchmarks/results/qlora.json
	@.venv/bin/python benchmarks/preprocess.py --json benchmarks/results/preprocess.json
	@.venv/bin/python benchmarks/convert.py --json benchmarks/results/convert.json
	@.venv/bin/python benchmarks/start_up.py --json benchmarks/results/start_up.json
	@.venv/bin/python benchmarks/render.py
