"""Trained rows of single tokens: lookup, output layer and loss as if they stood in the frozen tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.models.token_rows import TokenRows
from tests.support.models import VOCAB_SIZE, make_model
from tests.unit.models.conftest import BuildGpt

TOKENS = (VOCAB_SIZE, 9, 4)


def test_where_tokens_have_rows() -> None:
    rows = TokenRows(TOKENS, (5, 50), torch.zeros(2, 3))
    index, found = rows.find(torch.tensor([[4, 5, VOCAB_SIZE], [9, 10, 0]]))
    assert index.tolist() == [[2, 0, 0], [1, 0, 0]]
    assert found.tolist() == [[True, False, True], [True, False, False]]
    with torch.no_grad():
        rows.token_rows.copy_(torch.arange(9).view(3, 3))
    mine, columns = rows.in_output()
    assert mine.tolist() == [[3, 4, 5]] and columns.tolist() == [4]


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_as_if_they_stood_in_the_weights(kind: str, build_gpt: BuildGpt, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path / "model")
    lora = LoraConfig(lora_r=2, lora_alpha=2, lora_target_modules=("q_proj",))
    plan = plan_adapter(lora, shape_of(folder), 1, new_tokens=TOKENS)
    model = build_gpt(folder, plan)
    names = {name for name, parameter in model.named_parameters() if name.endswith("token_rows")}
    assert len(names) == (1 if kind == "llama-tied" else 2)
    generator = torch.Generator().manual_seed(2)
    for name in sorted(names):
        model.get_parameter(name).data.normal_(0.0, 0.5, generator=generator)
    tokens = torch.tensor([[1, VOCAB_SIZE, 4, 9, 9, 30]])
    labels = torch.tensor([[4, 4, VOCAB_SIZE, 7, -100, 9]])
    loss = model(tokens, labels=labels)
    loss.backward()
    gradients = [model.get_parameter(name).grad for name in sorted(names)]
    logits = model(tokens)
    # The same with whole trained tensors that hold these rows.
    embedding, output = model.embedding.word_embeddings, model.output_rows
    with torch.no_grad():
        embedding.weight[list(TOKENS)] = embedding.rows.token_rows
        model.output_weight()[list(TOKENS)] = output.token_rows
    model.embedding.word_embeddings, model.output_rows = embedding.base_layer, None
    for weight in {embedding.weight, model.output_weight()}:
        weight.requires_grad_(True)
    expected = model(tokens, labels=labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, model(tokens))
    weights = [embedding.weight] if kind == "llama-tied" else [embedding.weight, model.output_weight()]
    for found, weight in zip(gradients, weights, strict=True):
        torch.testing.assert_close(found, weight.grad[list(TOKENS)], rtol=1e-5, atol=1e-5)
