"""The Jinja chat template that renders the tokens which a prompt template gives.

It writes out the blanks that the tokenizer needs between pieces of text. What it cannot render is an answer
that the tokenizer merges with the end of the prompt (one that begins with white space behind a line feed,
say): answers are tokenised alone, the rendered text as a whole. The prompt of a first answer is
always rendered to the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindspeed_lora.data.conversation import Message, Turns, UnusableRow, to_turns
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.joints import Joints, find_joints
from mindspeed_lora.data.prompt_template import (
    BOS,
    CONTENT,
    END,
    PromptTemplate,
    prompt_template,
    user_slots,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_template(prompt_type: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The chat template that renders what ``--prompt-type prompt_type`` gives.

    Without a tokenizer it is the one for tokenizers that put no blank before a piece (byte-level ones).
    """
    template = prompt_template(prompt_type)
    joints = find_joints(tokenizer) if tokenizer is not None else Joints()
    own_end = template.end_token is not None and (
        tokenizer is None or template.end_token in tokenizer.get_vocab()
    )
    end = json.dumps(template.end_token) if own_end else "eos_token"
    return _Writer(template, joints, end).write()


def to_messages(turns: Turns) -> list[dict[str, str]]:
    """Turns as the messages that a chat template is rendered with."""
    messages = [{"role": "system", "content": turns.system}] if turns.system else []
    for question, answer in zip(turns.questions, turns.answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def count_differing(
    encoder: TemplateEncoder, template: str, conversations: Sequence[Sequence[Message]]
) -> int:
    """For how many conversations the chat template renders other tokens than the encoder gives."""
    differing = 0
    for conversation, row in zip(conversations, encoder.encode(conversations), strict=True):
        if isinstance(row, UnusableRow):
            continue
        rendered = encoder.tokenizer.apply_chat_template(
            to_messages(to_turns(conversation)), chat_template=template, return_dict=False
        )
        differing += rendered != row.input_ids.tolist()
    return differing


_START, _TEXT, _SPECIAL = "start", "text", "special"


class _Writer:
    """Writes the Jinja text; what stands before a piece decides whether a joint is needed."""

    def __init__(self, template: PromptTemplate, joints: Joints, end: str) -> None:
        self.template = template
        self.joints = joints
        self.end = end

    def write(self) -> str:
        template = self.template
        after_prefix = self._after(template.prefix, _START)
        system_slots: Sequence[str] = () if template.system_in_first_user else template.system
        with_system = self._slots(system_slots, "system", after_prefix)
        first_user = self._user("question", after_prefix)
        if system_slots:
            # Whether system text stands before the first question is known only when rendering.
            behind_system = self._user("question", self._after(system_slots, after_prefix))
            if behind_system != first_user:
                first_user = "{%- if system %}" + behind_system + "{%- else %}" + first_user + "{%- endif %}"
        after_answer = self._after(template.assistant, _TEXT)
        further_user = self._slots(template.separator, "", after_answer) + self._user(
            "question", self._after(template.separator, after_answer)
        )
        parts = [
            "{%- set system = " + json.dumps(template.default_system, ensure_ascii=False) + " %}",
            "{%- set turns = messages %}",
            "{%- if messages and messages[0]['role'] == 'system' %}",
            "{%- set turns = messages[1:] %}",
            "{%- if messages[0]['content'] %}{%- set system = messages[0]['content'] %}{%- endif %}",
            "{%- endif %}",
            self._slots(template.prefix, "", _START),
            "{%- if system %}" + with_system + "{%- endif %}" if with_system else "",
            "{%- for message in turns %}",
            "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
            "or message['role'] not in ['user', 'assistant'] %}",
            "{{- raise_exception('the roles after the system message must be user and assistant in turn') }}",
            "{%- endif %}",
            "{%- if message['role'] == 'user' %}",
            "{%- set question = message['content'] %}",
            "{%- if loop.first %}",
            self._fold_system(),
            first_user,
            "{%- else %}",
            further_user,
            "{%- endif %}",
            self._header(),
            "{%- else %}",
            self._slots(template.assistant, "message['content']", self._after_question()),
            "{%- endif %}",
            "{%- endfor %}",
        ]
        return "".join(parts)

    def _fold_system(self) -> str:
        if not self.template.system_in_first_user:
            return ""
        before, _, behind = "".join(self.template.system).partition(CONTENT)
        text = f"{_quote(before)} + system + {_quote(behind)} + question"
        return "{%- if system %}{%- set question = " + text + " %}{%- endif %}"

    def _user(self, content: str, before: str) -> str:
        return self._slots(self.template.user, content, before)

    def _header(self) -> str:
        """The answer's header, when an answer follows or is asked for; the empty thought with it."""
        template = self.template
        inner = "{{- " + _quote(template.answer_header) + " }}" if template.answer_header else ""
        if template.empty_thought:
            start, _, end = template.empty_thought.partition("\n\n")
            inner += (
                "{%- if loop.last or (" + _quote(start) + " not in loop.nextitem['content'] and "
                f"{_quote(end.strip())} not in loop.nextitem['content']) %}}"
                "{{- " + _quote(template.empty_thought) + " }}{%- endif %}"
            )
        return "{%- if not loop.last or add_generation_prompt %}" + inner + "{%- endif %}" if inner else ""

    def _after_question(self) -> str:
        return self._after(user_slots(self.template), _START)

    def _slots(self, slots: Sequence[str], content: str, before: str) -> str:
        written = ""
        for slot in slots:
            if slot in (BOS, END):
                written += "{{- bos_token }}" if slot == BOS else "{{- " + self.end + " }}"
            elif slot == CONTENT:
                written += "{%- if " + content + " %}" + self._text(slot, content, before) + "{%- endif %}"
            else:
                written += self._text(slot, content, before)
            before = self._after([slot], before)
        return written

    def _text(self, slot: str, content: str, before: str) -> str:
        joint = "" if self.joints.starts_special(slot) else self._joint(before)
        head, has_content, tail = slot.partition(CONTENT)
        if not has_content:
            return "{{- " + _quote(joint + head) + " }}"
        parts = [
            _quote(joint + head) if joint + head else "",
            content,
            _quote(tail) if tail else "",
        ]
        return "{{- " + " + ".join(part for part in parts if part) + " }}"

    def _joint(self, before: str) -> str:
        if before == _START:
            return ""
        return self.joints.after_special if before == _SPECIAL else self.joints.after_text

    def _after(self, slots: Sequence[str], before: str) -> str:
        if not slots:
            return before
        if slots[-1] in (BOS, END) or self.joints.ends_special(slots[-1]):
            return _SPECIAL
        return _TEXT


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
