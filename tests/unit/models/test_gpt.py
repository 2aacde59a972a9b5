"""The model of one rank: logits, loss, positions, vocabulary, recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.models.gpt import GPTModel
from tests.support.adapters import new_adapter
from tests.support.models import VOCAB_SIZE, make_model
from tests.unit.models.conftest import BuildGpt

TOKENS = torch.randint(0, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama3-rope", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama-tied", tmp_path_factory.mktemp("tied"))


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, :9] = -100
    labels[2] = -100
    return labels


@torch.no_grad()
def test_logits_are_those_of_transformers(build_gpt: BuildGpt, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(llama).eval()
    found = build_gpt(llama).eval()(TOKENS)
    assert found.shape == (16, 3, VOCAB_SIZE)
    torch.testing.assert_close(found.transpose(0, 1), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_last_position_alone(build_gpt: BuildGpt, llama: Path) -> None:
    model = build_gpt(llama).eval()
    last = model(TOKENS, last_only=True)
    assert last.shape == (1, 3, VOCAB_SIZE)
    torch.testing.assert_close(last, model(TOKENS)[-1:])


@pytest.mark.parametrize("divisible_by", [1, 64])
@pytest.mark.parametrize("folder", ["llama", "tied"])
def test_loss_is_the_summed_cross_entropy_over_the_own_vocabulary(
    build_gpt: BuildGpt, request: pytest.FixtureRequest, folder: str, divisible_by: int
) -> None:
    model = build_gpt(request.getfixturevalue(folder), divisible_by=divisible_by).eval()
    assert model.output_weight().size(0) == (131 if divisible_by == 1 else 192)
    with torch.no_grad():
        logits = model(TOKENS).transpose(0, 1)
        labels = labels_of(TOKENS)
        expected = F.cross_entropy(
            logits.reshape(-1, VOCAB_SIZE).double(), labels.reshape(-1), reduction="sum"
        )
        loss = model(TOKENS, labels=labels)
    assert logits.size(-1) == VOCAB_SIZE, "padding is no word that could be generated"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_positions_can_be_given(build_gpt: BuildGpt, llama: Path) -> None:
    model = build_gpt(llama).eval()
    plain = model(TOKENS)
    assert torch.equal(model(TOKENS, positions=torch.arange(16)), plain)
    rows = torch.arange(16).expand(3, 16).contiguous()
    torch.testing.assert_close(model(TOKENS, positions=rows), plain)
    rows[1] += 40
    moved = model(TOKENS, positions=rows)
    torch.testing.assert_close(moved[:, [0, 2]], plain[:, [0, 2]])
    stretched = model(TOKENS, positions=torch.arange(16) * 3)
    assert not torch.allclose(stretched, plain), "the distance of positions matters"


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(build_gpt: BuildGpt, llama: Path) -> None:
    model = build_gpt(llama).eval()
    padded = F.pad(TOKENS, (0, 8), value=5)
    torch.testing.assert_close(model(padded)[:16], model(TOKENS), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_parameter(build_gpt: BuildGpt, tied: Path) -> None:
    model = build_gpt(tied)
    assert model.output_weight() is model.embedding.word_embeddings.weight
    assert not [name for name, _ in model.named_parameters() if name.startswith("output_layer")]


def with_adapter(build_gpt: BuildGpt, folder: Path, **training: object) -> GPTModel:
    model = build_gpt(folder, new_adapter(shape_of(folder), 3, 6, seed=5), **training)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.train()


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    model(TOKENS, labels=labels_of(TOKENS)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ],
    ids=["selective", "each layer", "two layers", "block"],
)
def test_recomputation_gives_the_same_gradients(
    build_gpt: BuildGpt, llama: Path, recompute: dict[str, object]
) -> None:
    """With a frozen embedding and full recomputation all of them would silently be zero or missing."""
    plain = gradients(with_adapter(build_gpt, llama))
    found = gradients(with_adapter(build_gpt, llama, **recompute))
    assert len(plain) == 4 * 4 * 2
    for name, gradient in plain.items():
        assert gradient is not None and gradient.any(), name
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_frozen_model_keeps_no_graph(build_gpt: BuildGpt, llama: Path) -> None:
    model = build_gpt(llama).requires_grad_(False).train()
    assert not model(TOKENS, labels=labels_of(TOKENS)).requires_grad
