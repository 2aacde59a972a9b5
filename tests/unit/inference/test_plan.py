"""What a job means, and what is refused before any process joins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.plan import InferencePlan, plan_inference
from mindspeed_lora.inference.sampling import TokenChoice


def plan(folder: Path, *words: str) -> InferencePlan:
    return plan_inference(parse("inference", ["--load", str(folder), *words], {}))


def test_a_bare_job(model_folder: Path) -> None:
    made = plan(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert [prompt.text for prompt in made.prompts] == ["how are you?"]
    assert list(made.prompts[0].request.tokens) == tokenizer("how are you?")["input_ids"]
    assert made.stop.sequences == ((tokenizer.eos_token_id,),)
    assert made.adapter is None
    assert made.choice("greedy") == TokenChoice(do_sample=False)
    assert made.choice("do_sample") == TokenChoice(
        do_sample=True, temperature=0.7, top_k=50, top_p=0.95, seed=1234
    )


def test_a_template_brings_its_end(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (end,) not in plan(model_folder).stop.sequences
    assert (end,) in plan(model_folder, "--prompt-type", "chatml").stop.sequences


def test_further_tokens_end_an_answer(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    plain, end = plan(model_folder), tokenizer.convert_tokens_to_ids("<|im_end|>")
    made = plan(model_folder, "--add-eos-token", "<|im_end|>")
    assert made.stop.sequences == (*plain.stop.sequences, (end,))
    assert made.prompts[0].request.tokens == plain.prompts[0].request.tokens
    completed = plan(model_folder, "--add-eos-token").prompts[0].request.tokens
    assert list(completed) == [*plain.prompts[0].request.tokens, tokenizer.eos_token_id]
    with pytest.raises(Refused, match="--add-eos-token <no>: the tokenizer .* has no such token"):
        plan(model_folder, "--add-eos-token", "<no>")


def test_chat_takes_the_tokenizers_template(model_folder: Path) -> None:
    made = plan(model_folder, "--task", "chat")
    assert made.prompts == () and not made.chat_encoder.is_raw and made.encoder.is_raw
    assert any("--hf-chat-template" in notice for notice in made.notices)


def test_the_models_own_rules_are_told(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "repetition_penalty": 1.1, "min_length": 4})
    )
    made = plan(folder)
    assert made.choice("greedy").repetition_penalty == 1.1
    assert any("min_length 4" in notice for notice in made.notices)


def test_virtual_stages_have_no_effect(model_folder: Path) -> None:
    def two_stages(*words: str) -> InferencePlan:
        line = ["--load", str(model_folder), "--pipeline-model-parallel-size", "2", *words]
        return plan_inference(parse("inference", line, {"WORLD_SIZE": "2"}))

    made = two_stages("--num-virtual-stages-per-pipeline-rank", "2")
    assert made.placement.vp_size == 1 and made.placement.is_even
    assert "virtual pipeline stages have no effect on generation" in made.notices
    assert two_stages("--noop-layers", "0,1").placement.describe() == "2 no-op, 0-1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-new-tokens", "60"], "max_position_embeddings 64; lower --max-new-tokens to"),
        (["--prompt", "how " * 40], "prompt 1 has"),
        (["--task", "chat", "--prompt", "a"], "--task chat reads what you say from standard input"),
        (["--task", "chat", "--output-file", "a"], "--output-file holds answers to prompts"),
        (["--output-file", "/nowhere/at/all"], "there is no folder /nowhere/at"),
        (["--output-file", "/"], "is a folder"),
        (["--output-file", "/dev/null"], "/dev/null: is a device or a pipe"),
        (["--length-penalty", "nan"], "--length-penalty nan: expected a finite number"),
        (["--temperature", "0"], "--temperature 0.0: expected a number from 1e-20 to 1e20 (--task greedy"),
        (["--hidden-size", "64"], "--hidden-size 64 (checkpoint: 32)"),
        (["--tensor-model-parallel-size", "4"], "4 does not divide the model's 2 query groups"),
        (["--lora-load", "/nowhere"], "/nowhere: no such adapter folder"),
        (["--tokenizer-name-or-path", "/nowhere"], "tokenizer /nowhere: no such folder"),
    ],
)
def test_impossible_jobs_are_refused(model_folder: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(Refused) as error:
        plan_inference(parse("inference", ["--load", str(model_folder), *words], {"WORLD_SIZE": "4"}))
    assert sentence in str(error.value)


def test_the_prompts_are_not_replaced_by_the_answers(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(file)
    with pytest.raises(Refused, match="link.jsonl: holds the prompts"):
        plan(model_folder, "--prompt-file", str(file), "--output-file", str(tmp_path / "link.jsonl"))


def test_random_weights_are_refused() -> None:
    with pytest.raises(Refused, match="--load is missing"):
        plan_inference(parse("inference", [], {}))


def test_the_tokenizer_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder)
    config.vocab_size = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Refused, match="the model has 40 words"):
        plan(tmp_path, "--tokenizer-name-or-path", str(model_folder))


def test_a_folder_without_tokenizer_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, tmp_path)
    with pytest.raises(Refused, match="tokenizer"):
        plan(tmp_path)
