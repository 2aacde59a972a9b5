"""Answers of this package on the ranks of the pool, and of transformers in one process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.quantized import Quant, load_quantized

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, an adapter, and prompts that are answered together."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    adapter: str | None = None
    max_new_tokens: int = 14
    eos: tuple[int, ...] = (2,)
    sampling: dict[str, Any] | None = None
    """Keywords of ``TokenChoice``; None is greedy."""
    beams: dict[str, Any] | None = None
    """Keywords of ``BeamSettings``; None is no beam search."""
    first_stream: int = 0
    """Number of the first prompt's draws; the others' follow."""


def answers_on_rank(
    tp: int, pp: int, cases: Sequence[Case], stages: dict[str, Any] | None = None
) -> list[list[Tokens]]:
    """For each case the answers to its prompts, as this rank of the layout knows them.

    ``stages`` are further fields of the parallel configuration.
    """
    from mindspeed_lora.config.parallel import ParallelConfig
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups

    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **(stages or {})
    )
    groups, _ = initialize_groups(parallel, seed=1)
    try:
        return [_answers(case, parallel, groups) for case in cases]
    finally:
        destroy_groups()


def _answers(case: Case, parallel: Any, groups: Any) -> list[Tokens]:
    from mindspeed_lora.checkpoint.loading.model import build_model
    from mindspeed_lora.checkpoint.peft.plan import plan_adapter
    from mindspeed_lora.checkpoint.source import open_source
    from mindspeed_lora.config.lora import LoraConfig
    from mindspeed_lora.config.stages import LayerPlacement
    from mindspeed_lora.inference.beam_search import BeamSearch, BeamSettings
    from mindspeed_lora.inference.generator import Generator, Request
    from mindspeed_lora.inference.sampling import TokenChoice
    from mindspeed_lora.inference.stopping import StopRule
    from mindspeed_lora.models.transformer_config import transformer_config

    source = open_source(case.model)
    adapter = plan_adapter(LoraConfig(lora_load=case.adapter), source.shape, seed=1)
    config = transformer_config(source.shape, parallel, groups, torch.float32)
    chunk = LayerPlacement.of(source.shape.num_layers, parallel).chunk(groups.pp_rank)
    model, _ = build_model(source.shape, config, groups, source, adapter, chunk=chunk)
    generator = Generator(model, groups, StopRule(tuple((token,) for token in case.eos)))
    choice = TokenChoice(do_sample=case.sampling is not None, **(case.sampling or {}))
    requests = [
        Request(prompt, case.max_new_tokens, stream)
        for stream, prompt in enumerate(case.prompts, case.first_stream)
    ]
    if case.beams is not None:
        search = BeamSearch(model, groups, generator.stop)
        told = search.answer(requests, choice, BeamSettings(**case.beams))
        return [answer.tokens for answers in told for answer in answers]
    return [answer.tokens for answer in generator.generate(requests, choice)]


def transformers_greedy(
    model: str,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    adapter: str | None = None,
    quant: Quant | None = None,
    **keywords: Any,
) -> list[Tokens]:
    """The answers of transformers' ``generate``, one prompt at a time; ends as the model's folder says.

    ``keywords`` are further ones of ``generate``; with several answers to a prompt they follow each other.
    """
    from transformers import AutoModelForCausalLM

    reference: Any = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if quant is None
        else load_quantized(Path(model), quant, torch.float32)
    ).eval()
    if adapter is not None:
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, adapter).eval()
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            out = reference.generate(
                input_ids=torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                **keywords,
            )
        answers += [_unpadded(row[len(prompt) :].tolist(), keywords.get("eos_token_id", ())) for row in out]
    return answers


def _unpadded(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """Without what stands behind an end token, where answers of unequal length are told together."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: min(places) + 1] if places else tokens


def evaluate_on_rank(argv: Sequence[str], output: str) -> int:
    """``evaluation.py`` with these words on this rank, all that it says in ``<output>.<rank>``."""
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.evaluation.main import evaluate

    path = Path(f"{output}.{os.environ.get('RANK', '0')}")
    with (
        path.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        return evaluate(parse("evaluation", argv))


def infer_on_rank(argv: Sequence[str], output: str, said: Sequence[tuple[float, str]] = ()) -> int:
    """``inference.py`` with these words on this rank, its standard output in ``<output>.<rank>``.

    Args:
        argv: the command line.
        output: path of the standard output, without the rank.
        said: what comes from standard input, each text after so many seconds of silence.
    """
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.inference.main import infer

    path = Path(f"{output}.{os.environ.get('RANK', '0')}")
    with (
        path.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        _standard_input(said),
    ):
        return infer(parse("inference", argv))


@contextlib.contextmanager
def _standard_input(said: Sequence[tuple[float, str]]) -> Iterator[None]:
    reading, writing = os.pipe()

    def say() -> None:
        with os.fdopen(writing, "wb") as pipe:
            for silence, text in said:
                time.sleep(silence)
                pipe.write(text.encode())
                pipe.flush()

    before, thread = sys.stdin, threading.Thread(target=say, daemon=True)
    with os.fdopen(reading, encoding="utf-8") as sys.stdin:
        thread.start()
        try:
            yield
            thread.join()
        finally:
            sys.stdin = before
