"""``--add-tokens``: new words whose rows train as PEFT trains single tokens, and what is saved knows them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.lora import LoraConfig
from tests.support.adapters import write
from tests.support.differences import FACTOR, GRADIENT, LOGITS, LOSS, largest_logit_difference, largest_ratio
from tests.support.layouts import Layout
from tests.support.models import make_model
from tests.support.parity import Outcome, ParityBench
from tests.support.reference import Recipe, Reference
from tests.support.rows import Row, random_rows, write_rows
from tests.support.shards import largest_relative_difference, relative_difference
from tests.unit.data.made_tokenizers import make_tokenizer

TOKENS = ["<|extra|>", "Zucker", "<|more|>"]
LAYOUT = Layout(tp=2, pp=2, sequence_parallel=True)
RECIPE = Recipe(steps=5)


@dataclass(frozen=True)
class Grown:
    """A run with added tokens, of a base whose tokenizer ends before its vocabulary does or where it does."""

    base: Path
    tokens: Path
    words: int
    """Of the model with the new tokens."""
    numbers: tuple[int, ...]
    """Of the new tokens."""
    rows: list[Row]
    save: Path
    outcome: Outcome

    @property
    def probe_rows(self) -> list[list[int]]:
        """Their logits are compared."""
        return [row.input_ids for row in self.rows[:2]]


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def grown(
    request: pytest.FixtureRequest, bench: ParityBench, tmp_path_factory: pytest.TempPathFactory
) -> Grown:
    """The untied model's tokenizer leaves one row of the vocabulary unused, which the first new token takes."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer("gpt2")
    spare = 1 if request.param == "llama" else 0
    base = make_model(request.param, folder / "base", vocab_size=len(tokenizer) + spare)
    tokenizer.save_pretrained(base)
    (folder / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    first = len(tokenizer)
    rows = random_rows(7, first + len(TOKENS), 24)
    rows[0] = Row([first, first + 2, *rows[0].input_ids, first + 1], [-100, -100, *rows[0].labels, first + 1])
    argv = [
        *("--stage", "sft", "--load", base, "--data-path", write_rows(folder / "rows", rows), "--no-shuffle"),
        *(
            "--seq-length",
            "40",
            "--variable-seq-lengths",
            "--add-tokens",
            folder / "tokens.txt",
            "--lora-r",
            "4",
        ),
        *(
            "--lora-target-modules",
            "q_proj",
            "down_proj",
            "--save",
            folder / "run",
            "--micro-batch-size",
            "1",
        ),
        *LAYOUT.flags,
        *RECIPE.flags,
    ]
    probe = torch.zeros(2, 40, dtype=torch.int64)
    for line, row in zip(probe, rows[:2], strict=True):
        line[: len(row.input_ids)] = torch.tensor(row.input_ids)
    return Grown(
        base=base,
        tokens=folder / "tokens.txt",
        words=first + len(TOKENS),
        numbers=tuple(range(first, first + len(TOKENS))),
        rows=rows,
        save=folder / "run",
        outcome=bench.run([str(word) for word in argv], LAYOUT, probe),
    )


def ours(grown: Grown) -> list[torch.Tensor]:
    """Logits after training."""
    return grown.outcome.record([len(row) for row in grown.probe_rows]).end_logits


def test_trains_as_peft_trains_single_tokens(grown: Grown, tmp_path: Path) -> None:
    """The new rows start as the mean of all that the base has, which resizing in transformers may set too."""
    shape = shape_of(grown.base)
    lora = LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj", "down_proj"))
    plan = plan_adapter(lora, shape, 1, new_tokens=grown.numbers)
    assert plan is not None
    write(tmp_path / "start", plan.shape, plan, grown.outcome.start)
    reference = Reference(grown.base)
    means = [
        module.weight.detach().mean(dim=0)
        for module in (reference.base.model.embed_tokens, reference.base.lm_head)
    ]
    reference.resize(grown.words, value=9.0)
    reference.load_adapter(tmp_path / "start", tied=False)
    record = reference.train(grown.rows, RECIPE)
    assert largest_ratio(grown.outcome.losses, record.losses) <= LOSS
    assert largest_relative_difference(grown.outcome.gradients, record.gradients) <= GRADIENT
    rows = [name for name in record.end if name.endswith("token_rows")]
    # Factors that start at zero are no larger than what Adam makes of rounding in five steps.
    for name in rows:
        assert relative_difference(grown.outcome.end[name], record.end[name]) <= FACTOR
    for name, mean in zip(rows, means, strict=False):
        torch.testing.assert_close(grown.outcome.start[name][-1], mean)


def test_peft_loads_the_adapter_by_itself(grown: Grown) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    config = json.loads((grown.save / "adapter" / "adapter_config.json").read_text())
    numbers = list(grown.numbers)
    expected = {"embed_tokens": numbers, "lm_head": numbers} if "tied" not in str(grown.base) else numbers
    assert config["trainable_token_indices"] == expected and not config["modules_to_save"]
    tokenizer = AutoTokenizer.from_pretrained(grown.save / "adapter")
    assert tokenizer("a Zucker<|more|>")["input_ids"][-2:] == [grown.numbers[1], grown.numbers[2]]
    model = AutoPeftModelForCausalLM.from_pretrained(grown.save / "adapter").eval()
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in grown.probe_rows]
    assert largest_logit_difference(ours(grown), logits) <= LOGITS


def test_merged_model_has_the_new_words(grown: Grown, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merge = [
        "--load-dir",
        grown.base,
        "--lora-load",
        grown.save,
        "--save-model-type",
        "mg",
        "--save-dir",
        tmp_path / "mg",
    ]
    merge += ["--target-tensor-parallel-size", "4"]
    back = ["--load-dir", tmp_path / "mg", "--save-model-type", "hf", "--save-dir", tmp_path / "hf"]
    for words in (merge, back):
        convert(parse("convert", [str(word) for word in words]))
    folder = tmp_path / "hf" / "mg2hf"
    merged = Reference(folder)
    assert merged.config.vocab_size == grown.words
    assert len(AutoTokenizer.from_pretrained(folder)) == grown.words
    assert largest_logit_difference(ours(grown), [merged.logits(row) for row in grown.probe_rows]) <= LOGITS


def job_words(grown: Grown, data: object) -> list[object]:
    """A training of the model that the words are added to."""
    return [
        *("--stage", "sft", "--load", grown.base, "--data-path", data),
        *("--no-shuffle", "--variable-seq-lengths", "--seq-length", 40),
    ]


def test_goes_on_and_generates_with_the_adapters_own_tokenizer(
    grown: Grown, bench: ParityBench, tmp_path: Path
) -> None:
    """One step more, without naming the tokens; and ``inference.py`` reads them in a prompt."""
    from mindspeed_lora.inference.plan import plan_inference

    save = shutil.copytree(grown.save, tmp_path / "run", symlinks=True)
    data = write_rows(tmp_path / "rows", grown.rows)
    argv = [*job_words(grown, data), "--lora-r", 4, "--save", save, "--resume", "auto", *RECIPE.flags]
    more = bench.run([str(word) for word in [*argv, "--train-iters", RECIPE.steps + 1]], Layout())
    assert len(more.losses) == 1
    for name, tensor in grown.outcome.end.items():
        torch.testing.assert_close(more.start[name], tensor, rtol=0, atol=0)
    words = ["--load", grown.base, "--lora-load", save, "--prompt", "a Zucker<|more|>"]
    plan = plan_inference(parse("inference", [str(word) for word in words]))
    assert plan.prompts[0].request.tokens[-2:] == grown.numbers[1:]


def test_without_lora_the_whole_vocabulary_is_trained(
    grown: Grown, bench: ParityBench, tmp_path: Path
) -> None:
    """The saved model converts to a folder of transformers that knows the words."""
    from transformers import AutoTokenizer

    data = write_rows(tmp_path / "rows", grown.rows)
    argv = [*job_words(grown, data), "--add-tokens", grown.tokens, "--save", tmp_path / "run", *RECIPE.flags]
    argv += ["--train-iters", 2, "--lr-warmup-iters", 0, "--tensor-model-parallel-size", 2]
    probe = torch.tensor([[grown.numbers[0], *range(5, 20), grown.numbers[2]]])
    outcome = bench.run([str(word) for word in argv], Layout(tp=2), probe)
    back = ["--load-dir", tmp_path / "run", "--save-model-type", "hf", "--save-dir", tmp_path / "hf"]
    convert(parse("convert", [str(word) for word in back]))
    model = Reference(tmp_path / "hf" / "mg2hf")
    assert model.config.vocab_size == grown.words
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf" / "mg2hf")) == grown.words
    (logits,) = outcome.record([probe.size(1)]).end_logits
    assert largest_logit_difference([logits], [model.logits(probe[0].tolist())]) <= LOGITS
