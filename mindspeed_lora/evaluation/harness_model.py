"""Our model as lm-evaluation-harness's ``LM``. It lives on rank 0; the engine lets all ranks compute.

Texts become tokens by the rules of its ``HFLM``: the tokenizer's own special tokens, none where a text begins with the
start token already; contexts that are too long lose their beginning. Conversations in one of our own templates
(``--prompt-type``) keep the tokens of training: lm_eval gets them as text, which is known again here, and what is
scored begins behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.errors import Failed
from mindspeed_lora.evaluation.encoding import encode_pair
from mindspeed_lora.evaluation.engine import Engine, Generation
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.sampling import TokenChoice
from mindspeed_lora.inference.scoring import Score, ScoreRequest

if TYPE_CHECKING:
    from mindspeed_lora.evaluation.plan import EvaluationPlan

Tokens = tuple[int, ...]

_MAX_NEW_TOKENS = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """Scores and generates for lm_eval.

    Args:
        engine: the model.
        plan: the job.
    """

    def __init__(self, engine: Engine, plan: EvaluationPlan) -> None:
        super().__init__()
        self.engine = engine
        self.plan = plan
        self.tokenizer = plan.tokenizer
        start = self.tokenizer.bos_token_id
        self._start = int(self.tokenizer.eos_token_id if start is None else start)
        self._conversations: dict[str, Tokens] = {}
        """Conversations in one of our templates, by their text."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy generation would say."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text as a whole, in windows where it is longer than what the model reads."""
        windows = [list(self._windows(self._encode(request.args[0]))) for request in requests]
        scores = iter(self._score([pair for pairs in windows for pair in pairs]))
        return [sum(next(scores).log_likelihood for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The generated text of each request, up to its stop."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            order = self._generation([requests[i].args for i in numbers])
            answers = self.engine.generate(order)
            texts.update(
                (i, self.engine.text(answer, order.stop_words))
                for i, answer in zip(numbers, answers, strict=True)
            )
        return [texts[i] for i in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that the tokenizer brings along, or the name of ours."""
        if self.plan.encoder.template is not None:
            return f"--prompt-type {self.plan.encoder.template.name}"
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without ``add_generation_prompt`` its last message is an answer's beginning."""
        if self.plan.encoder.template is not None:
            return self._in_own_template(chat_history, add_generation_prompt)
        from jinja2.exceptions import TemplateError

        without_system = [message for message in chat_history if message["role"] != "system"]
        for messages in (chat_history, without_system):
            try:
                return self._in_tokenizers_template(messages, add_generation_prompt)
            except TemplateError as error:
                refusal = error
        raise Failed(f"--hf-chat-template: the template refuses the messages ({refusal})")

    def _in_tokenizers_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _in_own_template(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        messages: list[Message] = [{"role": one["role"], "content": one["content"]} for one in history]
        begun = "" if add_generation_prompt else str(messages.pop()["content"])
        tokens = (*self.plan.encoder.encode_conversation(messages), *self._added(begun))
        text = str(self.tokenizer.decode(list(tokens)))
        self._conversations[text] = tokens
        return text

    def _added(self, text: str) -> Tokens:
        """Tokens of what stands behind others."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode(self, text: str) -> list[int]:
        if text in self._conversations:
            return list(self._conversations[text])
        begun = text.startswith(str(self.tokenizer.decode([self._start])))
        return list(self.tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        if context in self._conversations:
            return self._conversations[context], self._added(continuation)
        if context:
            return encode_pair(self._encode, context, continuation)
        tokens = self._added(continuation)
        if tokens and tokens[0] == self._start:
            return tokens[:1], tokens[1:]
        return (self._start,), tokens

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        """The score of each pair; pairs of the same context are one request."""
        by_context: dict[Tokens, list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            room = self.plan.longest + 1 - len(continuation)
            if room < 1:
                raise Failed(
                    f"a text to score has {len(continuation)} tokens, but the model reads {self.plan.longest}"
                )
            by_context.setdefault(context[-room:], []).append(number)
        requests = [
            ScoreRequest(context, tuple(pairs[i][1] for i in numbers))
            for context, numbers in by_context.items()
        ]
        found: dict[int, Score] = {}
        for numbers, scores in zip(by_context.values(), self.engine.score(requests), strict=True):
            found.update(zip(numbers, scores, strict=True))
        return [found[i] for i in range(len(pairs))]

    def _windows(self, tokens: Sequence[int]) -> Iterator[tuple[Tokens, Tokens]]:
        """Every token once, after as many others as the model reads; the first after the start token."""
        longest = self.plan.longest
        first = tuple(tokens[:longest])
        if first:
            yield (self._start,), first
        for start in range(longest, len(tokens), longest):
            stop = min(start + longest, len(tokens))
            yield tuple(tokens[stop - longest - 1 : start]), tuple(tokens[start:stop])

    def _generation(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> Generation:
        """The order for contexts that share their keywords."""
        keywords = arguments[0][1]
        until = keywords.get("until") or []
        words = (until,) if isinstance(until, str) else tuple(until)
        lengths = [keywords[name] for name in _LENGTH_NAMES if keywords.get(name) is not None]
        most = int(self.plan.evaluation.max_new_tokens or (lengths[0] if lengths else _MAX_NEW_TOKENS))
        if most >= self.plan.longest:
            raise Failed(
                f"the task asks for {most} new tokens, but the model reads {self.plan.longest} tokens; lower "
                "--max-new-tokens"
            )
        requests = []
        for stream, (context, _) in enumerate(arguments):
            tokens = tuple(self._encode(context) or [self._start])[-(self.plan.longest - most) :]
            requests.append(Request(tokens, most, stream))
        return Generation(tuple(requests), self._choice(keywords), words)

    def _choice(self, keywords: dict[str, Any]) -> TokenChoice:
        temperature = float(keywords.get("temperature") or 0.0)
        samples = keywords.get("do_sample", temperature > 0.0)
        if not samples or temperature == 0.0:
            return self.plan.choice
        return TokenChoice(
            do_sample=True,
            temperature=temperature,
            top_k=int(keywords.get("top_k") or 0),
            top_p=float(keywords.get("top_p") or 1.0),
            repetition_penalty=self.plan.choice.repetition_penalty,
            seed=self.plan.evaluation.seed,
        )
