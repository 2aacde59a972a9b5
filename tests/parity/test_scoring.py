"""Log-likelihoods of continuations are transformers', with as few forward passes as are promised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool

NAMES = ("llama-tied", "mistral-window", "qwen2-moe", "deepseek-v3", "phi3-longrope")
TOLERANCE = 2e-4
"""Of sums over up to nine tokens in float32."""
Requests = list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]


def scores_on_rank(
    tp: int, pp: int, batch_size: int, cases: Sequence[tuple[str, Requests]]
) -> list[tuple[Any, list[tuple[int, int]]]]:
    """Of each case the scores, and rows and tokens of each forward pass of this rank."""
    from mindspeed_lora.checkpoint.loading.model import build_model
    from mindspeed_lora.checkpoint.source import open_source
    from mindspeed_lora.config.parallel import ParallelConfig
    from mindspeed_lora.config.stages import LayerPlacement
    from mindspeed_lora.inference.scoring import Scorer, ScoreRequest
    from mindspeed_lora.models.transformer_config import transformer_config
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups

    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    groups, _ = initialize_groups(parallel, seed=1)
    told = []
    try:
        for folder, requests in cases:
            source = open_source(folder)
            config = transformer_config(source.shape, parallel, groups, torch.float32)
            chunk = LayerPlacement.of(source.shape.num_layers, parallel).chunk(groups.pp_rank)
            model, _ = build_model(source.shape, config, groups, source, None, chunk=chunk)
            passes: list[tuple[int, int]] = []
            model.register_forward_pre_hook(
                lambda _, inputs, kept=passes: kept.append(tuple(inputs[0].shape))
            )
            scores = Scorer(model, groups, batch_size).score([ScoreRequest(*one) for one in requests])
            rows = scores and [[(one.log_likelihood, one.is_greedy) for one in row] for row in scores]
            told.append((rows, passes))
    finally:
        destroy_groups()
    return told


def requests_of(seed: int, longest: int) -> Requests:
    """Contexts of unequal length that begin with the same ten tokens; continuations of 1 to ``longest`` tokens."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(count))

    common = tokens(10)
    return [
        (common + tokens(draw.randint(1, 12)), tuple(tokens(draw.randint(1, longest)) for _ in range(4)))
        for _ in range(5)
    ]


def reference(folder: str, requests: Requests) -> list[list[tuple[float, bool]]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for context, continuations in requests:
        row = []
        for continuation in continuations:
            with torch.inference_mode():
                # The last token is not read: it would be one more that counts for longrope.
                logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0].double()
            after = logits[len(context) - 1 :].log_softmax(-1)
            wanted = torch.tensor(continuation)
            value = float(after.gather(1, wanted.unsqueeze(1)).sum())
            row.append((value, bool((after.argmax(-1) == wanted).all())))
        found.append(row)
    return found


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[str, Requests, list[list[tuple[float, bool]]]]]:
    folder = tmp_path_factory.mktemp("scored")
    made = []
    for seed, name in enumerate(NAMES):
        model = str(make_model(name, folder / name))
        requests = requests_of(seed, longest=9)
        # The likeliest continuation of one token is among the choices.
        (first, _), *rest = requests
        (words,) = reference(model, [(first, tuple((token,) for token in range(VOCAB_SIZE)))])
        best = words.index(max(words))
        requests = [(first, ((best,), (best, 5), (7,))), *rest]
        made.append((model, requests, reference(model, requests)))
    return made


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "batch_size"), [(1, 1, 1, 1), (2, 2, 1, 3), (2, 1, 2, 2), (2, 1, 1, 2)]
)
def test_scores_are_transformers(
    cases: list[tuple[str, Requests, Any]], workers: WorkerPool, ranks: int, tp: int, pp: int, batch_size: int
) -> None:
    told, *others = workers.run(
        ranks, scores_on_rank, tp, pp, batch_size, [(folder, requests) for folder, requests, _ in cases]
    )
    for (scores, _), (folder, _, expected) in zip(told, cases, strict=True):
        for row, wanted in zip(scores, expected, strict=True):
            assert [one[0] for one in row] == pytest.approx([one[0] for one in wanted], abs=TOLERANCE), folder
            assert [one[1] for one in row] == [one[1] for one in wanted], folder
        assert scores[0][0][1] and not scores[0][2][1]
    assert all(scores is None for other in others for scores, _ in other)


def test_one_pass_scores_all_choices_of_one_token(
    cases: list[tuple[str, Requests, Any]], workers: WorkerPool
) -> None:
    """The shared beginning goes through the model once, then each question's own tokens, and nothing else."""
    model = cases[0][0]
    requests = [(context, ((3,), (4,), (5,))) for context, _ in requests_of(5, longest=1)]
    (((_, alone),),) = workers.run(1, scores_on_rank, 1, 1, 1, [(model, requests)])
    own = sorted((len(context) - 10 for context, _ in requests), reverse=True)
    assert alone == [(1, 10), *((1, count) for count in own)]
    ((_, longer),) = workers.run(1, scores_on_rank, 1, 1, 5, [(model, requests_of(5, longest=6))])[0]
    assert len(longer) == 3 and longer[0] == (1, 10) and longer[1][0] == 5
