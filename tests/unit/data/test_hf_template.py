import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.conversation import UnusableRow
from mindspeed_lora.data.encoding import TokenRow
from mindspeed_lora.data.hf_template import HfTemplateEncoder
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import KINDS, make_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system text, please') }}{% endif %}{% endfor %}"
)
# Like Qwen3's: thoughts stay in the last answer alone.
THINKING = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and loop.last %}"
    "{% set thought = '' if '</think>' in message['content'] else '<think>\n\n</think>\n\n' %}"
    "{{ '<|im_start|>assistant\n' + thought + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'].split('</think>')[-1].strip() + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# The header counts the messages of the whole conversation.
COUNTING = "{{ messages | length }}" + CHATML


def conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, str]],
    loss_on: str = "assistant",
) -> TokenRow:
    tokenizer.chat_template = template
    (row,) = HfTemplateEncoder(tokenizer, loss_on).encode([messages])
    assert isinstance(row, TokenRow)
    rendered = tokenizer.apply_chat_template(messages, return_dict=False)
    assert row.input_ids.tolist() == rendered
    assert all(label in (-100, token) for label, token in zip(row.labels.tolist(), rendered, strict=True))
    return row


def trained(tokenizer: PreTrainedTokenizerFast, row: TokenRow) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token in row.labels.tolist():
        if token == -100:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_and_their_end_tokens_are_trained(kind: str, system: str | None) -> None:
    tokenizer = make_tokenizer(kind)
    row = encode(tokenizer, CHATML, conversation("Hi", "apple, pear", "More?", "plum ä", system=system))
    assert trained(tokenizer, row) == ["apple, pear<|im_end|>", "plum ä<|im_end|>"]


def test_the_last_answer_alone_and_everything() -> None:
    tokenizer = make_tokenizer("gpt2")
    messages = conversation("Hi", "apple", "More?", "plum")
    assert trained(tokenizer, encode(tokenizer, CHATML, messages, "last-assistant")) == ["plum<|im_end|>"]
    row = encode(tokenizer, CHATML, messages, "all")
    assert row.labels.tolist() == row.input_ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_before_the_answer_is_part_of_its_first_token(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    row = encode(tokenizer, LLAMA2, conversation("Name three fruits.", "apple", "More?", "plum"))
    found = ["".join(text.split()) for text in trained(tokenizer, row)]
    assert found == ["apple</s>", "plum</s>"]
    start = int((row.labels != -100).argmax())
    before = tokenizer.decode(row.input_ids[:start].tolist())
    assert before.rstrip().endswith("[/INST]")


def test_thoughts_that_only_the_last_answer_keeps() -> None:
    tokenizer = make_tokenizer("gpt2")
    messages = conversation("Hi", "<think>\nhm\n</think>\n\napple", "More?", "plum")
    assert trained(tokenizer, encode(tokenizer, THINKING, messages)) == [
        "apple<|im_end|>",
        "<think>\n\n</think>\n\nplum<|im_end|>",
    ]


def test_a_template_that_looks_ahead_is_refused() -> None:
    tokenizer = make_tokenizer("gpt2")
    with pytest.raises(Refused, match=r"message 2 of 4.*--prompt-type instead"):
        encode(tokenizer, COUNTING, conversation("Hi", "apple", "More?", "plum"))
    # Without labels to find, it does no harm.
    encode(tokenizer, COUNTING, conversation("Hi", "apple", "More?", "plum"), "all")


def test_what_the_template_refuses_is_told() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = LLAMA2
    with pytest.raises(Refused, match="no system text, please"):
        HfTemplateEncoder(tokenizer).encode([conversation("Hi", "apple", system="Be brief.")])


def test_a_tokenizer_without_template() -> None:
    with pytest.raises(Refused, match="has no chat template; give --prompt-type"):
        HfTemplateEncoder(make_tokenizer("gpt2"))


def test_rows_without_answers_keep_their_place() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    encoder = HfTemplateEncoder(tokenizer)
    first, empty, last = encoder.encode([conversation("a", "b"), conversation("a"), conversation("c", "d")])
    assert isinstance(empty, UnusableRow)
    assert isinstance(first, TokenRow) and isinstance(last, TokenRow)
    assert trained(tokenizer, last) == ["d<|im_end|>"]


def test_without_offsets_the_labels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("gpt2")
    messages = conversation("Hi", "apple, pear", "More?", "plum")
    expected = encode(tokenizer, CHATML, messages)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    row = encode(tokenizer, CHATML, messages)
    assert row.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "spm-first"])
def test_a_first_token_that_reaches_into_the_header_is_trained(kind: str) -> None:
    header_ends_with_blank = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST] ' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(kind)
    row = encode(tokenizer, header_ends_with_blank, conversation("Name three fruits.", "apple"))
    assert [text.strip() for text in trained(tokenizer, row)] == ["apple</s>"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for message in messages %}{{ message['role'] + 3 }}{% endfor %}", "can only concatenate str"),
        ("{% for message in messages %}{{ message['role'] + 3 }", "unexpected '}'"),
        ("{{ messages[0]['no']['such'] }}", "no attribute 'no'"),
    ],
)
def test_what_a_template_cannot_do_is_told(template: str, told: str) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = template
    with pytest.raises(Refused, match=f"chat template refuses the messages: .*{told}"):
        HfTemplateEncoder(tokenizer).encode([conversation("Hi", "apple")])


def test_a_conversation_that_the_assistant_begins_is_left_out() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    greeting = [{"role": "assistant", "content": "Welcome"}, *conversation("Hi", "apple")]
    left_out, kept = HfTemplateEncoder(tokenizer).encode([greeting, conversation("Hi", "apple")])
    assert isinstance(left_out, UnusableRow) and "first message is the assistant's" in str(left_out)
    assert isinstance(kept, TokenRow)
    (whole,) = HfTemplateEncoder(tokenizer, "all").encode([greeting])
    assert isinstance(whole, TokenRow)


TOOL = {"type": "function", "function": {"name": "clock"}}
CALLED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]},
]


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        (CALLED, "tool calls"),
        ([{"role": "system", "content": "", "tools": [TOOL]}, *conversation("Hi", "apple")], "tools"),
    ],
)
def test_a_template_that_leaves_out_tools_or_calls_is_refused(messages: list[dict], lost: str) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    with pytest.raises(
        Refused, match=rf"does not write {lost}, which this row has \(clock\); give --prompt-type"
    ):
        HfTemplateEncoder(tokenizer).encode([messages])
    tokenizer.chat_template = "{{ tools | tojson }}{{ messages | tojson }}{# tool_calls #}" + CHATML
    (row,) = HfTemplateEncoder(tokenizer, "all").encode([messages])
    assert isinstance(row, TokenRow)


def test_thoughts_of_their_own_are_written_even_where_the_template_does_not_know_them() -> None:
    tokenizer = make_tokenizer("gpt2")
    messages = conversation("Hi", "apple")
    messages[1]["reasoning_content"] = "a fruit"
    tokenizer.chat_template = CHATML
    (row,) = HfTemplateEncoder(tokenizer).encode([messages])
    assert isinstance(row, TokenRow)
    assert trained(tokenizer, row) == ["<think>\na fruit\n</think>\n\napple<|im_end|>"]
    knows = "(message['reasoning_content'] or '') + '!' + message['content']"
    tokenizer.chat_template = CHATML.replace("message['content']", knows)
    (row,) = HfTemplateEncoder(tokenizer).encode([messages])
    assert isinstance(row, TokenRow) and trained(tokenizer, row) == ["a fruit!apple<|im_end|>"]


def test_many_conversations_at_once_give_what_each_gives_alone() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    tool = {"type": "function", "function": {"name": "f"}}
    with_tools = [
        {"role": "system", "content": "", "tools": [tool]},
        *conversation("Hi", "apple", "More?", "plum"),
    ]
    given = [conversation("a", "b"), with_tools, conversation("c", "d", "e", "f", system="S"), with_tools]
    encoder = HfTemplateEncoder(tokenizer)
    for row, one in zip(encoder.encode(given), given, strict=True):
        (alone,) = encoder.encode([one])
        assert isinstance(row, TokenRow) and isinstance(alone, TokenRow)
        assert row.input_ids.tolist() == alone.input_ids.tolist()
        assert row.labels.tolist() == alone.labels.tolist()
    (row,) = encoder.encode([with_tools])
    assert isinstance(row, TokenRow) and '"name": "f"' in tokenizer.decode(row.input_ids.tolist())
