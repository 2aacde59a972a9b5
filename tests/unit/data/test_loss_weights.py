"""Keys ``loss`` and ``weight`` of messages and rows, from the raw rows to the samples of a training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.conversation import Message
from mindspeed_lora.data.encoding import ConversationEncoder, TemplateEncoder, TokenRow, with_end
from mindspeed_lora.data.hf_template import HfTemplateEncoder
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.loss_weights import message_weights, row_weight
from mindspeed_lora.data.prepared_info import read_info
from mindspeed_lora.data.preprocess import preprocess
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.sft_dataset import WEIGHTS_KEY, SftDataset, packed_prefix
from mindspeed_lora.data.show import show
from mindspeed_lora.data.template_files import prompt_template
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for number, keys in enumerate(answers):
        turns += [
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "content": f"answer {number}", **keys},
        ]
    return turns


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (conversation({}, {}), None),
        (conversation({"weight": 1}, {"loss": True}), None),
        (conversation({"weight": 0}, {}), (0.0, 1.0)),
        (conversation({"loss": False, "weight": 3}, {"weight": 2.5}), (0.0, 2.5)),
        ([{"role": "user", "content": "q", "loss": False}, *conversation({"loss": True})], None),
    ],
)
def test_weights_of_messages(messages: list[Message], expected: tuple[float, ...] | None) -> None:
    assert message_weights(messages, "assistant") == expected


@pytest.mark.parametrize(
    ("keys", "found"),
    [({"loss": "no"}, "loss is 'no'"), ({"weight": -1}, "weight is -1"), ({"weight": float("nan")}, "nan")],
)
def test_other_values_are_refused(keys: dict[str, Any], found: str) -> None:
    with pytest.raises(Refused, match=f"message 2.*{found}"):
        message_weights(conversation(keys), "assistant")
    with pytest.raises(Refused, match="line 7: weight is true|line 7: weight is True"):
        row_weight({"weight": True}, "line 7")


def test_what_a_user_says_has_no_weight_of_its_own() -> None:
    messages = [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}]
    with pytest.raises(Refused, match="message 1 of role user has the loss weight 1"):
        message_weights(messages, "assistant")
    assert message_weights(messages, "all") is None
    with pytest.raises(Refused, match="the loss weight 2"):
        message_weights([{**messages[0], "weight": 2}, messages[1]], "all")


@pytest.fixture(params=["template", "hf"])
def encoder_of(request: pytest.FixtureRequest, tokenizers: dict[str, PreTrainedTokenizerFast]) -> Any:
    def make(loss_on: str) -> ConversationEncoder:
        tokenizer = tokenizers["gpt2"]
        if request.param == "template":
            return TemplateEncoder(tokenizer, prompt_template("chatml"), loss_on)
        tokenizer.chat_template = CHATML
        return HfTemplateEncoder(tokenizer, loss_on)

    return make


def encoded(encoder: ConversationEncoder, messages: Sequence[Message]) -> TokenRow:
    row, plain = encoder.encode([messages, [{"role": m["role"], "content": m["content"]} for m in messages]])
    assert isinstance(row, TokenRow) and isinstance(plain, TokenRow)
    assert row.input_ids.tolist() == plain.input_ids.tolist(), "the keys are not rendered"
    return row


@pytest.mark.parametrize("loss_on", ["assistant", "last-assistant", "all"])
def test_tokens_of_an_answer_have_its_weight(encoder_of: Any, loss_on: str) -> None:
    encoder = encoder_of(loss_on)
    row = encoded(encoder, conversation({"weight": 2}, {"loss": False}, {"weight": 0.5})).weighted(1)
    plain = encoded(encoder, conversation({}, {}, {}))
    by_answer = [encoded(encoder_of("last-assistant"), conversation(*[{}] * n)).labels for n in (1, 2, 3)]
    answers = [np.flatnonzero(labels != IGNORE_INDEX) for labels in by_answer]
    expected = np.where(plain.labels != IGNORE_INDEX, 1.0, 0.0)
    for positions, weight in zip(answers, (2, 0, 0.5), strict=True):
        expected[positions] *= weight
    assert row.weights is not None and row.weights.dtype == np.float32
    assert np.where(row.labels == IGNORE_INDEX, 0, row.weights).tolist() == expected.tolist()


def test_only_zeros_and_ones_need_no_weights(encoder_of: Any) -> None:
    row = encoded(encoder_of("assistant"), conversation({"loss": False}, {})).weighted(1)
    assert row.weights is None
    assert row.labels.tolist() == encoded(encoder_of("last-assistant"), conversation({}, {})).labels.tolist()
    assert (row.weighted(0).labels == IGNORE_INDEX).all()


def test_the_end_token_has_the_last_answers_weight(encoder_of: Any) -> None:
    row = with_end(encoded(encoder_of("assistant"), conversation({}, {"weight": 3})), 7)
    assert row.weights is not None and (row.weights[-1], row.labels[-1]) == (3, 7)


ROWS: list[dict[str, Any]] = [
    {"messages": conversation({}, {})},
    {"messages": conversation({}, {}), "weight": 2},
    {"messages": conversation({"weight": 0.25}, {}), "weight": 2},
    {"messages": conversation({}), "weight": 0},
    {"messages": conversation({}), "weight": 1},
]


def prepared(folder: Path, rows: list[dict[str, Any]], *flags: str) -> Path:
    tokenizer = save_tokenizer(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--input", str(folder / "rows.jsonl"), "--tokenizer-name-or-path", str(tokenizer)]
    argv += ["--output-prefix", str(folder / "data"), "--prompt-type", "chatml", *flags]
    preprocess(parse("preprocess", argv))
    return folder / "data"


def test_weights_are_written_where_they_are_needed(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, ROWS)
    weights = IndexedDataset(packed_prefix(prefix, WEIGHTS_KEY))
    labels = IndexedDataset(packed_prefix(prefix, "labels"))
    assert weights.dtype == np.float32 and len(weights) == len(labels) == 4
    assert weights.sequence_lengths.tolist() == labels.sequence_lengths.tolist()
    found = [sorted({float(w) for w in weights[i][labels[i] != IGNORE_INDEX]}) for i in range(4)]
    assert found == [[1], [2], [0.5, 2], [1]]
    dataset = SftDataset(prefix, 4096)
    for i in range(4):
        sample = dataset[i]
        assert sample.weights is not None
        assert sample.weights.tolist() == weights[i].tolist()
    short = SftDataset(prefix, 12, overlong="proportional")[2]
    assert short.weights is not None and len(short.weights) == len(short.labels) == 12
    info = read_info(prefix)
    assert info is not None and info.weighted
    prepared(tmp_path, [ROWS[0], ROWS[4]], "--overwrite")
    assert SftDataset(prefix, 4096)[0].weights is None, "weights of an earlier set are gone"
    info = read_info(prefix)
    assert info is not None and not info.weighted


def test_weights_are_shown(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    argv = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer-name-or-path", str(tokenizer)]
    stream = io.StringIO()
    show(parse("preprocess", [*argv, "--prompt-type", "chatml", "--show", "3"]), stream)
    first, second, third = stream.getvalue().strip().split("\n\n")
    assert "  loss       " in first and "×" not in first
    assert "  loss × 2   " in second and "  loss       " not in second
    assert "  loss × 0.5 " in third and "  loss × 2   " in third


@pytest.mark.parametrize("flag", ["--pack", "--neat-pack"])
def test_packed(tmp_path: Path, flag: str) -> None:
    single, packed = tmp_path / "single", tmp_path / "packed"
    for folder in (single, packed):
        folder.mkdir()
    rows = SftDataset(prepared(single, ROWS), 4096)
    whole = SftDataset(prepared(packed, ROWS, flag, "--seq-length", "64"), 64)
    expected = [w for i in range(4) for w in sample_weights(rows[i])]
    found = [w for i in range(len(whole)) for w in sample_weights(whole[i])]
    assert sorted(found) == sorted(expected) and 0.5 in found


def sample_weights(sample: Any) -> list[float]:
    trained = sample.labels != IGNORE_INDEX
    trained[0] = False
    return sample.weights[trained].tolist()


def test_a_weight_of_zero_carries_no_loss(tmp_path: Path) -> None:
    """Also where a foreign set leaves the label there."""
    prefix = prepared(tmp_path, ROWS)
    path = Path(packed_prefix(prefix, WEIGHTS_KEY) + ".bin")
    path.write_bytes(np.zeros(path.stat().st_size // 4, dtype=np.float32).tobytes())
    assert (SftDataset(prefix, 4096)[0].labels == IGNORE_INDEX).all()
