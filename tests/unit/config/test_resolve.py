from __future__ import annotations

from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused


def refusal(command: str, line: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(Refused) as error:
        parse(command, line.split(), environ or {})
    return str(error.value)


def test_generation_without_a_prompt_asks_the_published_one() -> None:
    job: Any = parse("inference", ["--load", "m"], {})
    assert job.inference.task == ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
    assert any("chat needs a terminal" in notice for notice in job.notices)
    assert parse("inference", ["--load", "m", "--prompt", "hi"], {}).inference.task == ("greedy",)
    assert job.inference.prompt == ("how are you?",)
    assert len(job.notices) == 2
    assert parse("inference", ["--load", "m", "--task", "chat"], {}).inference.prompt is None


def test_ranks_of_context_parallelism_generate_as_replicas() -> None:
    words = "--load m --context-parallel-size 2 --context-parallel-algo ulysses_cp_algo"
    job: Any = parse("inference", words.split(), {"WORLD_SIZE": "3"})
    assert job.parallel.context_parallel_size == 1
    assert any("--context-parallel-size has no effect on generation" in notice for notice in job.notices)


@pytest.mark.parametrize(
    ("given", "tasks"), [("greedy_search", ("greedy",)), ("do_sample greedy", ("do_sample", "greedy"))]
)
def test_tasks_have_other_names(given: str, tasks: tuple[str, ...]) -> None:
    assert parse("inference", f"--load m --prompt hi --task {given}".split(), {}).inference.task == tasks


def test_flags_of_other_tasks_are_told() -> None:
    line = "--load m --prompt hi --task greedy --num-beams 2 --top-k 3 --history-turns 1 --micro-batch-size 2"
    (told,) = (one for one in parse("inference", line.split(), {}).notices if one.startswith("no effect"))
    assert told == "no effect on greedy: --top-k, --num-beams, --history-turns"
    line = line.replace("--task greedy", "--task beam_search_with_sampling chat")
    assert not any("no effect" in one for one in parse("inference", line.split(), {}).notices)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-beams 2 --num-return-sequences 3", "--num-return-sequences 3 is more than --num-beams 2"),
        ("--task dance", "--task dance: expected one of greedy"),
        ("--prompt a --prompt-file b", "--prompt and --prompt-file"),
        ("--bf16 --fp16", "--bf16 and --fp16"),
        ("--tensor-model-parallel-size 2", "world size 1 is not divisible"),
        ("--exit-on-missing-checkpoint", "without --load"),
        ("--load your model directory path", "--load is still the placeholder"),
        ("--temperature 0", "--temperature 0.0: expected a number from 1e-20 to 1e20 (--task greedy"),
        ("--dry-run --tensor-model-parallel-size 2 --world-size 3", "world size 3 is not divisible"),
    ],
)
def test_refused_generations(line: str, message: str) -> None:
    assert message in refusal("inference", line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--save-dir b --save-model-type hf", "--load-dir is missing"),
        ("--load-dir a --save-model-type hf", "--save-dir is missing"),
        ("--load-dir a --save-dir b", "--save-model-type is missing"),
        ("--load-dir a --save-dir ./a/ --save-model-type mg", "--save-dir ./a/ is the --load-dir"),
        ("--load-dir a --save-dir b --save-model-type mg --save-lora-to-hf", "--save-lora-to-hf"),
        (
            "--load-dir a --save-dir b --save-model-type hf --target-pipeline-parallel-size 2",
            "--target-pipeline-parallel-size 2: --save-model-type hf",
        ),
        (
            "--load-dir a --save-dir b --save-model-type hf --target-expert-parallel-size 2",
            "--target-expert-parallel-size 2: --save-model-type hf",
        ),
        (
            "--load-dir a --save-dir b --save-model-type peft --qlora-nf4",
            "--qlora-nf4 quantises a model, but --save-model-type peft writes an adapter",
        ),
        (
            "--load-dir a --save-dir b --save-model-type mg --merge-dequantized --qlora",
            "--merge-dequantized is given without --lora-load",
        ),
        (
            "--load-dir a --save-dir b --save-model-type mg --qlora --qlora-save-dequantize",
            "--qlora writes quantised weights and --qlora-save-dequantize plain ones",
        ),
    ],
)
def test_refused_conversions(line: str, message: str) -> None:
    assert message in refusal("convert", line)


def test_a_conversion_back_may_write_beside_its_source() -> None:
    job: Any = parse("convert", ["--load-dir", "a", "--save-dir", "a", "--save-model-type", "hf"], {})
    assert job.conversion.target_tensor_parallel_size == 1


def test_stages_tell_nothing_about_a_model_that_is_not_cut() -> None:
    line = ["--load-dir", "a", "--save-dir", "b", "--save-model-type", "hf", "--noop-layers", "3"]
    job: Any = parse("convert", line, {})
    assert any("found from its files: --noop-layers" in notice for notice in job.notices)


@pytest.mark.parametrize(("saver", "means"), [("megatron", "mg"), ("saver_hf", "hf")])
def test_the_module_that_writes_names_the_format(saver: str, means: str) -> None:
    job: Any = parse("convert", ["--load-dir", "a", "--save-dir", "b", "--saver", saver], {})
    assert job.conversion.save_model_type == means


def test_an_adapter_alone_is_written_in_hugging_face_form() -> None:
    job: Any = parse("convert", ["--load-dir", "a", "--save-dir", "b", "--save-lora-to-hf"], {})
    assert job.conversion.save_model_type == "hf"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--output-prefix o --tokenizer-name-or-path t", "--input is missing"),
        ("--input i --tokenizer-name-or-path t", "--output-prefix is missing"),
        ("--input i --output-prefix o", "--tokenizer-name-or-path is missing"),
        (
            "--input i --output-prefix o --tokenizer-model t --map-keys [1]",
            "--map-keys [1]: expected a JSON object",
        ),
        ("--input i --output-prefix o --tokenizer-model t --pack", "--pack is given without --seq-length"),
        ("--input i --output-prefix o --tokenizer-model t --neat-pack", "--neat-pack is given without"),
        ("--print-config --pack", "--pack is given without --seq-length"),
        (
            "--input i --output-prefix o --tokenizer-model t --prompt-type qwen --hf-chat-template",
            "--prompt-type qwen and --hf-chat-template",
        ),
    ],
)
def test_refused_preparations(line: str, message: str) -> None:
    assert message in refusal("preprocess", line)


@pytest.mark.parametrize("command", ["convert", "preprocess", "posttrain"])
def test_printing_the_configuration_needs_no_paths(command: str) -> None:
    assert parse(command, ["--print-config"], {"WORLD_SIZE": "3"}).runtime.print_config
