"""``inference.py`` as people run it: tasks, files, chat over a pipe, several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.generation import infer_on_rank, transformers_greedy
from tests.support.pool import WorkerPool

ROOT = Path(__file__).parents[3]
PROMPTS = ("how are you?", "Name", "[INST] Name three fruits and a bread. [/INST]")


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_rows(model_folder: Path, max_new_tokens: int) -> list[dict[str, object]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = transformers_greedy(str(model_folder), prompts, max_new_tokens)
    return [
        {"prompt": prompt, "text": tokenizer.decode(answer, skip_special_tokens=True), "token_ids": answer}
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "batch"), [(1, 1, 1, 2), (2, 1, 1, 3), (1, 2, 1, 1), (1, 1, 2, 1)]
)
def test_the_output_file_holds_transformers_answers(
    model_folder: Path, tmp_path: Path, workers: WorkerPool, tp: int, pp: int, dp: int, batch: int
) -> None:
    """With more replicas than one the prompts are shared out, and come back in order."""
    output = tmp_path / "answers.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ["--load", str(model_folder), "--prompt-file", str(prompts), "--output-file", str(output)]
    words += ["--max-new-tokens", "12", "--micro-batch-size", str(batch), "--task", "greedy"]
    words += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    assert set(workers.run(tp * pp * dp, infer_on_rank, words, str(tmp_path / "out"))) == {0}
    assert rows(output) == expected_rows(model_folder, 12)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    shown = [(tmp_path / f"out.{rank}").read_text(encoding="utf-8") for rank in range(tp * pp * dp)]
    assert all(f"You: {prompt}" in shown[0] for prompt in PROMPTS) and not any(shown[1:])


def test_several_tasks_run_in_turn(model_folder: Path, tmp_path: Path, workers: WorkerPool) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["--load", str(model_folder), "--prompt", "Name", "--output-file", str(output)]
    words += ["--max-new-tokens", "6", "--task", "do_sample", "greedy", "--seed", "9"]
    workers.run(1, infer_on_rank, words, str(tmp_path / "out"))
    found = rows(output)
    assert [row["task"] for row in found] == ["do_sample", "greedy"]
    workers.run(1, infer_on_rank, words, str(tmp_path / "out"))
    assert rows(output) == found
    assert found[0]["token_ids"] != found[1]["token_ids"]


def test_what_was_asked_is_kept_and_can_be_repeated(
    model_folder: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    """Beside the answers, under their name; what someone else wrote under it stays."""
    first, second = tmp_path / "answers.jsonl", tmp_path / "again.jsonl"
    words = ["--load", str(model_folder), "--prompt", "Name", "--output-file", str(first), "--seed", "9"]
    words += [
        "--max-new-tokens",
        "6",
        "--task",
        "do_sample",
        "greedy",
        "--stop-words",
        "a",
        "--early-stopping",
        "true",
    ]
    workers.run(1, infer_on_rank, words, str(tmp_path / "out"))
    kept = tmp_path / "answers.config.yaml"
    assert kept.read_text(encoding="utf-8").startswith("# inference.py; again: inference.py --config ")
    other = tmp_path / "again.config.yaml"
    other.write_text("# posttrain_gpt.py\n")
    again = ["--config", str(kept), "--output-file", str(second)]
    workers.run(1, infer_on_rank, again, str(tmp_path / "out"))
    assert rows(second) == rows(first)
    assert other.read_text() == "# posttrain_gpt.py\n"
    assert (tmp_path / "inference.config.yaml").is_file()
    (line,) = (one for one in kept.read_text().splitlines() if one.startswith("early-stopping"))
    assert line == "early-stopping: 'true'"


def test_all_tasks_run_in_turn_and_beams_are_transformers(
    model_folder: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["--load", str(model_folder), "--prompt", *PROMPTS[:2], "--output-file", str(output)]
    words += ["--task", "greedy_search", "do_sample", "beam_search", "beam_search_with_sampling"]
    words += ["--max-new-tokens", "7", "--num-beams", "3", "--num-return-sequences", "2"]
    words += ["--length-penalty", "0.5", "--early-stopping", "true"]
    workers.run(1, infer_on_rank, words, str(tmp_path / "out"))
    found = rows(output)
    names = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
    assert [row["task"] for row in found] == [name for name in names for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    keywords = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True}
    ends = [tokenizer.eos_token_id]
    expected = transformers_greedy(str(model_folder), prompts, 7, eos_token_id=ends, **keywords)
    told = [[row["token_ids"], row["others"][0]["token_ids"]] for row in found[4:6]]  # type: ignore[index]
    assert [tokens for both in told for tokens in both] == expected
    assert "others" not in found[0] and found[6]["token_ids"]


def test_stop_words_end_an_answer(model_folder: Path, tmp_path: Path, workers: WorkerPool) -> None:
    """Also where they begin and end within tokens; the words are no part of the text."""
    whole = str(expected_rows(model_folder, 12)[0]["text"])
    word = whole[5:8]
    output = tmp_path / "answers.jsonl"
    words = ["--load", str(model_folder), "--prompt", PROMPTS[0], "--output-file", str(output)]
    words += ["--max-new-tokens", "12", "--stop-words", word, "never said", "--task", "greedy", "beam_search"]
    workers.run(1, infer_on_rank, words, str(tmp_path / "out"))
    greedy, beams = rows(output)
    assert greedy["text"] == whole[: whole.index(word)]
    assert len(greedy["token_ids"]) < 12  # type: ignore[arg-type]
    assert word not in str(beams["text"])


def test_chat_with_a_quantised_model(model_folder: Path, tmp_path: Path, workers: WorkerPool) -> None:
    words = [
        "--load",
        str(model_folder),
        "--task",
        "chat",
        "--max-new-tokens",
        "6",
        "--qlora",
        "--hide-thinking",
    ]
    assert workers.run(1, infer_on_rank, words, str(tmp_path / "out"), [(0.0, "Name\nq\n")]) == [0]
    assert (tmp_path / "out.0").read_text(encoding="utf-8").count("You >> ") == 2


def test_chat_over_a_pipe(model_folder: Path) -> None:
    """As people run it: a process of its own, without a launcher."""
    words = [sys.executable, str(ROOT / "inference.py"), "--load", str(model_folder)]
    words += ["--task", "chat", "--max-new-tokens", "8"]
    said = "how are you? 你好\n\nclear\n" + "how " * 80 + "\nName\nq\nnever read\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, input=said, capture_output=True, encoding="utf-8", env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("You >> ") == 6
    assert "(a new conversation)" in done.stdout and "your message has" in done.stdout
    assert "Traceback" not in done.stderr


def test_chat_over_two_ranks_says_what_one_rank_says(
    model_folder: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    """Rank 0 reads and writes for both, until its input ends in the middle of a line."""
    words = ["--load", str(model_folder), "--task", "chat", "--max-new-tokens", "8", "--seed", "5"]
    said = [(0.0, "how are you?\nName three\nName")]
    workers.run(1, infer_on_rank, words, str(tmp_path / "alone"), said)
    words += ["--tensor-model-parallel-size", "2"]
    workers.run(2, infer_on_rank, words, str(tmp_path / "out"), said)
    alone = (tmp_path / "alone.0").read_text(encoding="utf-8")
    assert (tmp_path / "out.0").read_text(encoding="utf-8") == alone
    assert (tmp_path / "out.1").read_text(encoding="utf-8") == ""
    assert alone.count("You >> ") == 4


def test_a_person_may_think_longer_than_ranks_wait(
    model_folder: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    words = ["--load", str(model_folder), "--task", "chat", "--max-new-tokens", "4"]
    words += ["--tensor-model-parallel-size", "2", "--distributed-timeout-minutes", "0.05"]
    workers.run(2, infer_on_rank, words, str(tmp_path / "out"), [(5.0, "Name\n"), (5.0, "q\n")])
    assert (tmp_path / "out.0").read_text(encoding="utf-8").count("You >> ") == 2


def test_a_megatron_checkpoint_brings_its_tokenizer_along(
    model_folder: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    words = ["--load-model-type", "hf", "--save-model-type", "mg", "--target-tensor-parallel-size", "2"]
    words += ["--load-dir", str(model_folder), "--save-dir", str(tmp_path / "mg")]
    convert(parse("convert", words, {}))
    output = tmp_path / "answers.jsonl"
    words = ["--load", str(tmp_path / "mg"), "--prompt", *PROMPTS, "--output-file", str(output)]
    workers.run(1, infer_on_rank, [*words, "--max-new-tokens", "12"], str(tmp_path / "out"))
    assert rows(output) == expected_rows(model_folder, 12)
