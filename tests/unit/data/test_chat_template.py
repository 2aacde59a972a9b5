import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.chat_template import chat_template, count_differing, to_messages
from mindspeed_lora.data.conversation import Turns
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.joints import find_joints
from mindspeed_lora.data.prompt_template import pieces, special_tokens
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from tests.unit.data.made_tokenizers import KINDS, make_tokenizer

PROMPT_TYPES = sorted(prompt_templates())
CONVERSATIONS = [
    Turns("", ("Name three fruits.",), ("apple, pear, plum",)),
    Turns("Answer in French.", ("How do I bake bread?",), ("Voici la phrase.",)),
    Turns("", ("a", "b c\n", "d"), ("x y", "z\n\nz", "1 2 3")),
    Turns("You are\na helper.", ("Q: 'it's'", "R"), ("A \\n {{ b }}", "B")),
]
THINKING = Turns("", ("hm",), ("<think>\nlet me see\n</think>\n\nIt is so.",))
# One tokenizer sees ".[" of system text and question as one word; the other splits the two line feeds of a
# header when an answer follows.
MERGED = {
    *(("llama3", "mistral"), ("llama3", "mixtral"), ("llama3", "glm4_moe")),
    *(("gpt2", "llama3"), ("gpt2", "qwen3"), ("gpt2", "magistral"), ("gpt2", "glm4_moe")),
}


def rendered(tokenizer: PreTrainedTokenizerFast, turns: Turns, template: str, **options: bool) -> list[int]:
    return tokenizer.apply_chat_template(
        to_messages(turns), chat_template=template, return_dict=False, **options
    )


@pytest.mark.parametrize("prompt_type", PROMPT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_the_prompt_type(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, prompt_type: str
) -> None:
    if (kind, prompt_type) in MERGED:
        pytest.skip("no chat template can keep these pieces apart")
    tokenizer = family_tokenizers[kind]
    template = chat_template(prompt_type, tokenizer)
    encoder = TemplateEncoder(tokenizer, prompt_template(prompt_type))
    # An answer that begins with a special token needs no blank before it, which no template can know.
    thinking = [] if kind.startswith("spm") else [THINKING]
    for turns in CONVERSATIONS + thinking:
        (row,) = encoder.encode([to_messages(turns)])
        assert rendered(tokenizer, turns, template) == row.input_ids.tolist(), turns


@pytest.mark.parametrize("prompt_type", PROMPT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_starts_where_the_last_answer_does(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, prompt_type: str
) -> None:
    if (kind, prompt_type) in MERGED:
        pytest.skip("no chat template can keep these pieces apart")
    tokenizer = family_tokenizers[kind]
    template = chat_template(prompt_type, tokenizer)
    encoder = TemplateEncoder(tokenizer, prompt_template(prompt_type), "last-assistant")
    for turns in CONVERSATIONS:
        messages = to_messages(turns)
        (row,) = encoder.encode([messages])
        start = int((row.labels != -100).argmax())
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template, return_dict=False, add_generation_prompt=True
        )
        assert prompt == row.input_ids[:start].tolist()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    prompt_type=st.sampled_from(["qwen", "chatml", "llama3", "qwen3"]),
    texts=st.lists(
        st.from_regex(r"[A-Za-z][A-Za-z0-9 ,.!?\n\"'{}()-]{0,20}[a-z.]", fullmatch=True),
        min_size=2,
        max_size=6,
    ),
    system=st.sampled_from(["", "Be brief."]),
)
def test_any_text(kind: str, prompt_type: str, texts: list[str], system: str) -> None:
    tokenizer = _made(kind)
    if (kind, prompt_type) in MERGED:
        return
    turns = Turns(
        system, tuple(texts[: len(texts) // 2]), tuple(texts[len(texts) // 2 : len(texts) // 2 * 2])
    )
    (row,) = TemplateEncoder(tokenizer, prompt_template(prompt_type)).encode([to_messages(turns)])
    assert rendered(tokenizer, turns, chat_template(prompt_type, tokenizer)) == row.input_ids.tolist()


_cache: dict[str, PreTrainedTokenizerFast] = {}


def _made(kind: str) -> PreTrainedTokenizerFast:
    if kind not in _cache:
        _cache[kind] = make_tokenizer(kind)
    return _cache[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_of_a_first_answer_is_always_the_same(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    tokenizer = family_tokenizers[kind]
    for prompt_type in PROMPT_TYPES:
        template = chat_template(prompt_type, tokenizer)
        encoder = TemplateEncoder(tokenizer, prompt_template(prompt_type))
        for turns in [Turns("Be brief.", ("Hi",), ('"quoted"',)), Turns("", ("Hi!\n",), ("\n\n  code",))]:
            messages = to_messages(turns)
            (row,) = encoder.encode([messages])
            start = int((row.labels != -100).argmax())
            prompt = tokenizer.apply_chat_template(
                messages[:-1], chat_template=template, return_dict=False, add_generation_prompt=True
            )
            assert prompt == row.input_ids[:start].tolist(), prompt_type


def test_sentencepiece_texts_are_tokenised_as_if_alone(
    family_tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    for kind in KINDS[2:]:
        tokenizer = family_tokenizers[kind]
        for prompt_type in PROMPT_TYPES:
            template = prompt_template(prompt_type)
            for turns in CONVERSATIONS:
                alone: list[int] = []
                for content, _ in pieces(template, turns, special_tokens(template, tokenizer)):
                    ids = [content] if isinstance(content, int) else tokenizer.encode(content)
                    alone += ids
                (row,) = TemplateEncoder(tokenizer, template).encode([to_messages(turns)])
                assert row.input_ids.tolist() == alone


def test_what_pieces_need_between_them(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    found = {kind: find_joints(tokenizer) for kind, tokenizer in tokenizers.items()}
    assert {kind: (joints.after_text, joints.after_special) for kind, joints in found.items()} == {
        "gpt2": ("", ""),
        "llama3": ("", ""),
        "spm-legacy": (" ", ""),
        "spm-first": (" ", " "),
        "spm-always": (" ", ""),
    }


def test_rows_that_cannot_be_rendered_are_counted(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["gpt2"]
    encoder = TemplateEncoder(tokenizer, prompt_template("chatml"))
    conversations = [
        to_messages(Turns("", ("q",), (answer,))) for answer in ("good", "\n\n  indented", "fine")
    ]
    assert count_differing(encoder, chat_template("chatml", tokenizer), conversations) == 1


def test_without_the_end_token_the_tokenizers_own_ends_an_answer() -> None:
    tokenizer = make_tokenizer("gpt2")
    template = chat_template("qwen", tokenizer)
    assert "eos_token" not in template
    bare = PreTrainedTokenizerFast(
        tokenizer_object=_without(tokenizer, "<|im_end|>"), bos_token="<s>", eos_token="</s>"
    )
    encoder = TemplateEncoder(bare, prompt_template("qwen"))
    turns = Turns("", ("Q",), ("A",))
    (row,) = encoder.encode([to_messages(turns)])
    assert row.input_ids[-1] == bare.eos_token_id
    assert rendered(bare, turns, chat_template("qwen", bare)) == row.input_ids.tolist()


def _without(tokenizer: PreTrainedTokenizerFast, token: str) -> object:
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
    vocabulary = content["model"]["vocab"]
    vocabulary["never written"] = vocabulary.pop(token)
    return Tokenizer.from_str(json.dumps(content))


def test_roles_out_of_turn_are_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(Exception, match="user and assistant in turn"):
        tokenizers["gpt2"].apply_chat_template(messages, chat_template=chat_template("qwen"), tokenize=False)
