"""The Jinja chat template that renders the tokens which a prompt template gives.

It writes out the blanks that the tokenizer needs between pieces of text. What it cannot render is an answer
that the tokenizer merges with the end of the prompt (one that begins with white space behind a line feed,
say): answers are tokenised alone, the rendered text as a whole. The prompt of a first answer is
always rendered to the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.conversation import Message, Turns, UnusableRow, to_turns
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.joints import Joints, find_joints
from mindspeed_lora.data.prompt_template import (
    BOS,
    CONTENT,
    END,
    NUMBER,
    PromptTemplate,
    observation_slots,
    token_of,
    user_slots,
)
from mindspeed_lora.data.template_files import prompt_template
from mindspeed_lora.data.tools import CALL_JOINT, jinja_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_template(prompt_type: str | PromptTemplate, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The chat template that renders what ``--prompt-type prompt_type`` gives.

    Without a tokenizer it is the one for tokenizers that put no blank before a piece (byte-level ones).
    """
    template = prompt_template(prompt_type) if isinstance(prompt_type, str) else prompt_type
    joints = find_joints(tokenizer) if tokenizer is not None else Joints()
    own_end = template.end_token is not None and (
        tokenizer is None or template.end_token in tokenizer.get_vocab()
    )
    end = json.dumps(template.end_token) if own_end else "eos_token"
    return _Writer(template, joints, end).write()


def to_messages(turns: Turns) -> list[dict[str, Any]]:
    """Turns as the messages that a chat template is rendered with; tools are given to it apart."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": turns.system}] if turns.system else []
    for number, (question, answer) in enumerate(zip(turns.questions, turns.answers, strict=True)):
        if number in turns.results:
            messages += [{"role": "tool", "content": result} for result in turns.results[number]]
        else:
            messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
        if number in turns.calls:
            messages[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turns.calls[number]
            ]
    return messages


def render(tokenizer: PreTrainedTokenizerBase, template: str, turns: Turns) -> list[int]:
    """The tokens that a chat template gives for a conversation."""
    tools: Any = [dict(tool) for tool in turns.tools] or None
    return list(
        tokenizer.apply_chat_template(
            to_messages(turns), chat_template=template, tools=tools, return_dict=False
        )
    )


def count_differing(
    encoder: TemplateEncoder, template: str, conversations: Sequence[Sequence[Message]]
) -> int:
    """For how many conversations the chat template renders other tokens than the encoder gives."""
    differing = 0
    frame = encoder.template.thought_frame
    for conversation, row in zip(conversations, encoder.encode(conversations), strict=True):
        if isinstance(row, UnusableRow):
            continue
        turns = to_turns(conversation, frame)
        differing += render(encoder.tokenizer, template, turns) != row.input_ids.tolist()
    return differing


_START, _TEXT, _SPECIAL = "start", "text", "special"


class _Writer:
    """Writes the Jinja text; what stands before a piece decides whether a joint is needed."""

    def __init__(self, template: PromptTemplate, joints: Joints, end: str) -> None:
        self.template = template
        self.joints = joints
        self.end = end

    def write(self) -> str:
        parts = [
            self._opening(),
            "{%- set state = namespace(number=0, results=[]) %}",
            "{%- for message in turns %}",
            self._check_turn(),
            "{%- set content = message['content'] or '' %}",
            "{%- if message['role'] == 'user' %}",
            "{%- set question = content %}",
            self._question(user_slots(self.template)),
            "{%- elif message['role'] == 'tool' %}",
            self._results(),
            "{%- else %}",
            self._answer(),
            "{%- endif %}",
            "{%- endfor %}",
        ]
        return "".join(parts)

    def _opening(self) -> str:
        """What stands before the first question: the system text, and the tools in it."""
        template = self.template
        after_prefix = self._after(template.prefix, _START)
        system_slots: Sequence[str] = () if template.system_in_first_user else template.system
        with_system = self._slots(system_slots, "system", after_prefix)
        if with_system and not self._has_system_always:
            with_system = "{%- if system %}" + with_system + "{%- endif %}"
        return "".join(
            [
                "{%- set system = " + json.dumps(template.default_system, ensure_ascii=False) + " %}",
                "{%- set turns = messages %}",
                "{%- if messages and messages[0]['role'] == 'system' %}",
                "{%- set turns = messages[1:] %}",
                "{%- if messages[0]['content'] %}{%- set system = messages[0]['content'] %}{%- endif %}",
                "{%- endif %}",
                "{%- if tools %}{%- set described %}" + template.tools.jinja(_quote) + "{%- endset %}",
                "{%- set system = system + described %}{%- endif %}",
                self._slots(template.prefix, "", _START),
                with_system,
            ]
        )

    @property
    def _has_system_always(self) -> bool:
        """Whether something stands in the place of the system text where there is none."""
        return self.template.force_system and self.template.system != (CONTENT,)

    def _check_turn(self) -> str:
        return (
            "{%- set before = 'assistant' if loop.first else loop.previtem['role'] %}"
            "{%- if message['role'] not in ['user', 'assistant', 'tool'] or "
            "(message['role'] == 'assistant') == (before == 'assistant') and "
            "not (message['role'] == 'tool' and before == 'tool') %}"
            "{{- raise_exception('the roles after the system message must be user and assistant in turn') }}"
            "{%- endif %}"
        )

    def _question(self, slots: Sequence[str]) -> str:
        """A question, or what stands for it, and the header of its answer."""
        template = self.template
        header, last = template.answer_header, slots[-1]
        slots = [*slots[:-1], last.removesuffix(header)] if header else slots
        after_prefix = self._after(template.prefix, _START)
        first = self._slots(slots, "question", after_prefix)
        if not template.system_in_first_user:
            # Whether system text stands before the first question is known only when rendering.
            behind_system = self._slots(slots, "question", self._after(template.system, after_prefix))
            if self._has_system_always:
                first = behind_system
            elif behind_system != first:
                first = "{%- if system %}" + behind_system + "{%- else %}" + first + "{%- endif %}"
        after_answer = self._after_answer()
        further = self._slots(template.separator, "", after_answer) + self._slots(
            slots, "question", self._after(template.separator, after_answer)
        )
        return (
            "{%- if state.number == 0 %}"
            + self._fold_system()
            + first
            + "{%- else %}"
            + further
            + "{%- endif %}{%- set state.number = state.number + 1 %}"
            + self._header()
        )

    def _results(self) -> str:
        """Results of tools, put together behind the last of them."""
        joint = _quote(self.template.observation_joint)
        return (
            "{%- set state.results = state.results + [content] %}"
            "{%- if loop.last or loop.nextitem['role'] != 'tool' %}"
            "{%- set question = state.results | join("
            + joint
            + ") %}{%- set state.results = [] %}"
            + self._question(observation_slots(self.template))
            + "{%- endif %}"
        )

    def _answer(self) -> str:
        template = self.template
        slots = template.function or template.assistant
        called = (
            "{%- set calls %}" + jinja_calls(template.call_text, _quote) + "{%- endset %}"
            "{%- if content and not (content | trim).endswith(" + _quote(template.thought_end) + ") %}"
            "{%- set content = content + " + _quote(CALL_JOINT) + " %}{%- endif %}"
            "{%- set content = content + calls %}"
        )
        end_of_row = ""
        if template.efficient_eos:
            end_of_row = "{%- if loop.last %}{{- " + self.end + " }}{%- endif %}"
        return (
            self._thoughts()
            + "{%- if message['tool_calls'] %}"
            + called
            + self._written(slots)
            + "{%- else %}"
            + self._written(template.assistant)
            + "{%- endif %}"
            + end_of_row
        )

    def _thoughts(self) -> str:
        """Whether an answer has thoughts; they are taken out where ``--enable-thinking false`` did so."""
        template = self.template
        if not template.empty_thought:
            return ""
        cut = ""
        if template.thinking is False and template.thought_words:
            end = _quote(template.thought_words[1].strip())
            cut = "{%- set content = (content.split(" + end + ") | last).lstrip('\\n') %}"
        return cut + "{%- set has_thought = " + self._has_thought("content") + " %}"

    def _written(self, slots: Sequence[str]) -> str:
        """An answer, which stands behind the header or behind the empty thought."""
        thought = self.template.empty_thought
        before = self._after(user_slots(self.template), _START)
        plain = self._slots(slots, "content", before)
        if not thought:
            return plain
        behind = self._slots(slots, "content", self._after([thought], before))
        if self.template.thinking:
            behind = self._text(thought, "", before) + behind
        if behind == plain:
            return plain
        return "{%- if has_thought %}" + plain + "{%- else %}" + behind + "{%- endif %}"

    def _has_thought(self, answer: str) -> str:
        words = self.template.thought_words or ()
        return " or ".join(f"{_quote(word.strip())} in {answer}" for word in words) or "false"

    def _fold_system(self) -> str:
        if not self.template.system_in_first_user:
            return ""
        before, _, behind = "".join(self.template.system).partition(CONTENT)
        text = f"{_quote(before)} + system + {_quote(behind)} + question"
        return "{%- if system %}{%- set question = " + text + " %}{%- endif %}"

    def _header(self) -> str:
        """The answer's header, when an answer follows or is asked for; the empty thought with it."""
        template = self.template
        inner = "{{- " + _quote(template.answer_header) + " }}" if template.answer_header else ""
        if template.empty_thought and not template.thinking:
            # Where the thought is no special token, it stands behind the header as text behind text does.
            written = self._text(template.empty_thought, "", self._after(user_slots(template), _START))
            has_thought = self._has_thought("(loop.nextitem['content'] or '')")
            if template.thinking is None:
                written = "{%- if loop.last or not (" + has_thought + ") %}" + written + "{%- endif %}"
            inner += written
        return "{%- if not loop.last or add_generation_prompt %}" + inner + "{%- endif %}" if inner else ""

    def _slots(self, slots: Sequence[str], content: str, before: str) -> str:
        written = ""
        for slot in slots:
            if slot in (BOS, END):
                written += "{{- bos_token }}" if slot == BOS else "{{- " + self.end + " }}"
            elif slot == CONTENT:
                written += "{%- if " + content + " %}" + self._text(slot, content, before) + "{%- endif %}"
            elif slot:
                written += self._text(slot, content, before)
            before = self._after([slot], before)
        return written

    def _text(self, slot: str, content: str, before: str) -> str:
        slot = token_of(slot) or slot
        joint = "" if self.joints.starts_special(slot) else self._joint(before)
        head, has_content, tail = slot.partition(CONTENT)
        parts = _numbered(joint + head)
        if has_content:
            parts += [content, *_numbered(tail)]
        return "{{- " + " + ".join(parts) + " }}"

    def _joint(self, before: str) -> str:
        if before == _START:
            return ""
        return self.joints.after_special if before == _SPECIAL else self.joints.after_text

    def _after_answer(self) -> str:
        return self._after(self.template.assistant, _TEXT)

    def _after(self, slots: Sequence[str], before: str) -> str:
        slots = [slot for slot in slots if slot]
        if not slots:
            return before
        last = token_of(slots[-1]) or slots[-1]
        return _SPECIAL if last in (BOS, END) or self.joints.ends_special(last) else _TEXT


def _numbered(text: str) -> list[str]:
    """Jinja expressions of a text in which the number of the question may stand."""
    parts: list[str] = []
    for number, part in enumerate(text.split(NUMBER)):
        parts += ["state.number | string"] if number else []
        parts += [_quote(part)] if part else []
    return parts


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
