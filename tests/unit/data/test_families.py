"""Prompt templates beside the chat templates of the models that they are for."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mindspeed_lora.data.chat_template import to_messages
from mindspeed_lora.data.conversation import Turns
from mindspeed_lora.data.encoding import TemplateEncoder, TokenRow
from mindspeed_lora.data.hf_template import HfTemplateEncoder
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from tests.conftest import Assets
from tests.unit.data.family_templates import FAMILIES

REFERENCE_NAMES = {
    *(
        "chatglm2",
        "chatglm3",
        "chatglm3_system",
        "glm4",
        "chatml",
        "chatml_de",
        "cpm",
        "default",
        "empty",
        "trl",
    ),
    *(
        "qwen",
        "qwen_r1",
        "qwen_math_r1",
        "llama3",
        "mistral",
        "mixtral",
        "gemma",
        "llama2",
        "alpaca",
        "deepseek2",
    ),
    *("deepseek2-lite", "minicpm3", "baichuan2", "deepseek3", "intern2", "hunyuan", "qwen3", "bailing_mini"),
    *("qwen_lf", "magistral", "plm", "glm4_moe", "gpt_oss", "deepseek4"),
}
SINGLE = [Turns("", ("Name three fruits.",), ("apple, pear, plum",)), Turns("", ("a b",), ("c",))]
SYSTEM = [Turns("Answer in French.", ("How do I bake bread?",), ("Voici la phrase.",))]
SEVERAL = [Turns("", ("a", "b c", "d"), ("x y", "z", "1 2 3"))]
# A byte-level tokenizer that does not merge a header with the answer behind it, and one of the SentencePiece kind.
KIND = {
    "llama2": "spm-legacy",
    "mistral": "gpt2",
    "llama3": "llama3",
    "qwen3": "llama3",
    "magistral": "llama3",
}


def encoded(tokenizer: PreTrainedTokenizerFast, prompt_type: str, turns: Turns) -> TokenRow:
    (row,) = TemplateEncoder(tokenizer, prompt_template(prompt_type), "last-assistant").encode(
        [to_messages(turns)]
    )
    assert isinstance(row, TokenRow)
    return row


def test_every_template_of_mindspeed_llm_is_there() -> None:
    assert set(prompt_templates()) >= REFERENCE_NAMES


@pytest.mark.parametrize("prompt_type", sorted(FAMILIES))
def test_as_the_family_renders_it(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], prompt_type: str
) -> None:
    family = FAMILIES[prompt_type]
    tokenizer = family_tokenizers[KIND.get(prompt_type, "gpt2")]
    conversations = (
        SINGLE + (SYSTEM if family.with_system else []) + (SEVERAL if family.several_turns else [])
    )
    for turns in conversations:
        if prompt_type == "magistral" and not turns.system:
            continue  # the published default is longer than a line
        row = encoded(tokenizer, prompt_type, turns)
        messages = to_messages(turns)
        start = int((row.labels != -100).argmax())
        if len(turns.questions) == 1 or not family.prompts_only:
            prompt = tokenizer.apply_chat_template(
                messages[:-1], chat_template=family.jinja, add_generation_prompt=True, return_dict=False
            )
            assert row.input_ids[:start].tolist() == prompt, turns
        if not family.prompts_only:
            whole = tokenizer.apply_chat_template(messages, chat_template=family.jinja, return_dict=False)
            # Some close the last turn with a line feed, some do not.
            assert tokenizer.decode(row.input_ids).rstrip("\n") == tokenizer.decode(whole).rstrip("\n"), turns
            shorter = min(len(whole), len(row.input_ids))
            assert row.input_ids[:shorter].tolist() == whole[:shorter]
            assert len(whole) - shorter <= 1


def test_chatml_is_what_smollm2_renders(smollm2: Assets) -> None:
    """Tokens and labels, with the published tokenizer and its own template."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.model)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for turns in [*SINGLE, *SYSTEM, *SEVERAL]:
        with_system = Turns(turns.system or system, turns.questions, turns.answers)
        own = HfTemplateEncoder(tokenizer).encode([to_messages(turns)])[0]
        ours = TemplateEncoder(tokenizer, prompt_template("chatml")).encode([to_messages(with_system)])[0]
        assert isinstance(own, TokenRow) and isinstance(ours, TokenRow)
        # The published template ends with a line feed behind the last end token, without loss.
        assert own.input_ids.tolist()[: len(ours.input_ids)] == ours.input_ids.tolist()
        assert own.labels.tolist()[: len(ours.labels)] == ours.labels.tolist()
        assert tokenizer.decode(own.input_ids[len(ours.input_ids) :]) in ("", "\n")
