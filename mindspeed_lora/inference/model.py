"""A loaded model that a program asks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch

from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.inference.plan import plan_inference, plan_prompts
from mindspeed_lora.inference.session import READING, InferenceSession
from mindspeed_lora.parallel.heartbeat import for_answers
from mindspeed_lora.parallel.joining import joined_groups


class Model:
    """A model with or without an adapter, cut over the ranks; :func:`mindspeed_lora.load` opens it.

    Every rank makes the same calls and gets the same answers. To be used in a ``with`` statement, or closed with
    :meth:`close`.
    """

    def __init__(self, job: InferenceJob) -> None:
        """Plans, joins, loads.

        Raises:
            Refused: the job cannot be, found before anything is loaded.
            Failed: the work could not be done.
        """
        with ExitStack() as stack:
            self._plan = plan_inference(job)
            joined = stack.enter_context(joined_groups(job.parallel, job.inference.seed, for_answers))
            groups, notices, heartbeat = joined
            heartbeat.mark(READING)
            self._session = InferenceSession(self._plan, groups)
            heartbeat.mark("what the program does with the model")
            if groups.is_main:
                for text in (*job.notices, *self._plan.notices, *notices, *self._session.notices):
                    print(f"notice: {text}", file=sys.stderr, flush=True)
            self._open = stack.pop_all()

    @property
    def job(self) -> InferenceJob:
        """The configuration, with every default filled in."""
        return self._plan.job

    @property
    def module(self) -> torch.nn.Module:
        """This rank's part of the model, the adapter in place."""
        return self._session.model

    def generate(self, prompts: str | Sequence[str]) -> list[str]:
        """The answer to each prompt, in order; how tokens are chosen and where answers end is told on opening.

        Raises:
            Refused: a prompt is too long, or has a token that the model does not know.
        """
        plan, texts = self._plan, [prompts] if isinstance(prompts, str) else list(prompts)
        planned = plan_prompts(texts, plan.encoder, plan.limit, plan.shape.vocab_size)
        task, size = plan.job.inference.task[0], plan.job.inference.micro_batch_size
        answers: list[str] = []
        for start in range(0, len(planned), size):
            requests = [prompt.request for prompt in planned[start : start + size]]
            answers += [self._session.text(best) for best, *_ in self._session.answer(task, requests)]
        return answers

    def close(self) -> None:
        """Gives the groups back; harmless when closed."""
        self._open.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
