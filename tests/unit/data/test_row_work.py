import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.handlers import (
    ALPACA,
    PRETRAIN,
    SHAREGPT_PAIRS,
    PairHandler,
    TextHandler,
    make_handler,
)
from mindspeed_lora.data.hf_template import HfTemplateEncoder
from mindspeed_lora.data.outcome import Outcome, Outcomes
from mindspeed_lora.data.pair_work import GIVEN_CONVERSATIONS, PairWork
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.row_work import InstructionWork, TextWork
from mindspeed_lora.data.template_files import prompt_template
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import make_tokenizer


def row(instruction: str, output: str = "a", number: int = 1) -> Row:
    return Row(f"f.json, row {number}", {"instruction": instruction, "output": output}, 1.0)


def work(tokenizer: PreTrainedTokenizerFast, prompt_type: str = "llama2", **options: Any) -> InstructionWork:
    handler = make_handler(ALPACA)
    assert not isinstance(handler, TextHandler)
    return InstructionWork(
        handler=handler, encoder=TemplateEncoder(tokenizer, prompt_template(prompt_type)), **options
    )


def lengths(outcome: Outcome) -> list[int]:
    return [len(document) for document in outcome.documents]


def test_one_outcome_a_row(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    outcomes = work(tokenizers["gpt2"])([row("q"), row("", ""), row("r")])
    assert [outcome.reason for outcome in outcomes] == [None, "question and answer are empty", None]
    input_ids, attention_mask, labels = outcomes[0].documents
    assert len(input_ids) == len(attention_mask) == len(labels)
    assert set(attention_mask.tolist()) == {1}
    assert outcomes[0].num_loss_tokens == 2
    assert not outcomes[0].was_cut


def test_too_long_rows(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    rows = [row("q", "word " * 50), row("word " * 50, "b")]
    cut, dropped = work(tokenizers["gpt2"], seq_length=20)(rows)
    assert (lengths(cut), cut.was_cut, cut.reason) == ([20] * 3, True, None)
    assert dropped.reason == "longer than --seq-length, and without loss when cut"
    first, second = work(tokenizers["gpt2"], seq_length=20, overlong="proportional")(rows)
    assert lengths(first) == lengths(second) == [20] * 3
    assert second.documents[2][-1] == tokenizers["gpt2"].eos_token_id
    for outcome in work(tokenizers["gpt2"], seq_length=20, overlong="drop")(rows):
        assert outcome.reason == "longer than --seq-length"


def test_exactly_seq_length_is_no_cut(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    (whole,) = work(tokenizers["gpt2"])([row("q", "some words")])
    n = lengths(whole)[0]
    (same,) = work(tokenizers["gpt2"], seq_length=n, overlong="drop")([row("q", "some words")])
    assert not same.was_cut
    assert same.documents[0].tolist() == whole.documents[0].tolist()


def test_the_end_token_is_appended(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    (plain,) = work(tokenizers["gpt2"], "empty")([row("q")])
    (ended,) = work(tokenizers["gpt2"], "empty", end_token_id=2)([row("q")])
    assert ended.documents[0].tolist() == [*plain.documents[0].tolist(), 2]
    assert ended.documents[2][-1] == 2
    (llama2,) = work(tokenizers["gpt2"], end_token_id=2)([row("q")])
    assert llama2.documents[0].tolist()[-2:] != [2, 2]


def test_an_answer_without_tokens_is_dropped(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    (outcome,) = work(tokenizers["gpt2"], "empty")([row("q", "")])
    assert outcome.reason == "no token carries loss"


def test_an_error_of_the_template_names_the_row() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    handler = make_handler(ALPACA)
    assert not isinstance(handler, TextHandler)
    chat = InstructionWork(handler=handler, encoder=HfTemplateEncoder(tokenizer))
    with pytest.raises(Refused, match="^f.json, row 2: the tokenizer's chat template refuses"):
        chat([row("q"), row("bad", number=2), row("r", number=3)])


@pytest.mark.parametrize("thinking", [None, True, False])
def test_of_pairs_only_the_last_answer_has_thoughts(
    tokenizers: dict[str, PreTrainedTokenizerFast], thinking: bool | None
) -> None:
    tokenizer = tokenizers["llama3"]
    template = replace(prompt_template("qwen3"), thinking=thinking)
    handler = make_handler(SHAREGPT_PAIRS)
    assert isinstance(handler, PairHandler)
    encoder = TemplateEncoder(tokenizer, template, "last-assistant")
    pairs = PairWork(handler=handler, single=InstructionWork(handler=GIVEN_CONVERSATIONS, encoder=encoder))
    said = ["one", "<think>\nhm\n</think>\n\ntwo", "three", "four", "five"]
    values = {
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "<think>\nso\n</think>\n\nno"},
    }
    (outcome,) = pairs([Row("w", values, 1.0)])
    chosen, _, rejected, labels = (document.tolist() for document in outcome.documents)
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    before = asked.format("one", "two<|im_end|>\n") + asked.format("three", "four<|im_end|>\n")
    empty, given = "<think>\n\n</think>\n\n", "<think>\nso\n</think>\n\n"
    assert tokenizer.decode(chosen) == before + asked.format("five", empty + "yes<|im_end|>\n")
    last = (empty if thinking is False else given) + "no<|im_end|>\n"
    assert tokenizer.decode(rejected) == before + asked.format("five", last)
    trained = tokenizer.decode([label for label in labels if label >= 0])
    assert trained == last.removeprefix(empty if thinking is False else "")


def test_texts() -> None:
    tokenizer = make_tokenizer("gpt2")
    handler = make_handler(PRETRAIN, json_keys=("a", "b"))
    assert isinstance(handler, TextHandler)
    text_work = TextWork(handler=handler, tokenizer=tokenizer, end_token_id=2)
    texts = [("one", "two words"), ("x", ""), ("", "")]
    kept, half, dropped = text_work([Row("w", {"a": a, "b": b}, 1.0) for a, b in texts])
    assert [document.tolist() for document in kept.documents] == [
        [*tokenizer.encode("one"), 2],
        [*tokenizer.encode("two words"), 2],
    ]
    assert (kept.num_tokens, kept.num_loss_tokens) == (sum(lengths(kept)),) * 2
    # The text of one column is not lost because another is empty.
    assert [document.tolist() for document in half.documents] == [[*tokenizer.encode("x"), 2], []]
    assert dropped.reason == "the text is empty"
    assert text_work.keys == ("a", "b")


def test_outcomes_are_the_same_behind_a_process() -> None:
    ids = np.arange(5, dtype=np.int32)
    sent = Outcomes(
        [
            Outcome((ids, ids[:0], ids[3:]), num_loss_tokens=2, weights=np.ones(5, dtype=np.float32)),
            Outcome(reason="broken", problem="line 2"),
            Outcome((ids[1:],), was_cut=True, num_tokens=9),
        ]
    )
    for outcomes in (sent, Outcomes([Outcome(reason="empty")]), Outcomes()):
        arrived = pickle.loads(pickle.dumps(outcomes))
        assert repr(arrived) == repr(outcomes)
        dtypes = [document.dtype for outcome in arrived for document in outcome.documents]
        assert all(dtype == np.int32 for dtype in dtypes)
