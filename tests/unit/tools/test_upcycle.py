"""A dense model as one with experts: the same function, tokens on every expert, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import upcycle
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from mindspeed_lora.errors import Refused
from tests.support.models import VOCAB_SIZE, make_model

ROUNDING = 2e-5
"""Of logits up to about 10 in float32: a token's two experts are weighed and summed in another order."""
TOKENS = torch.randint(3, VOCAB_SIZE, (4, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("dense"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder)(TOKENS).logits


def shares(model: Any) -> torch.Tensor:
    """``[layers, E]``: the part of the tokens' choices that each expert gets."""
    with torch.inference_mode():
        chosen = model(TOKENS, output_router_logits=True).router_logits
    counts = [one.topk(2, -1).indices.flatten().bincount(minlength=one.size(-1)) for one in chosen]
    return torch.stack([count / count.sum() for count in counts])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama3-rope", "mistral-window"])
def test_the_function_is_the_dense_models(name: str, tmp_path: Path) -> None:
    source = make_model(name, tmp_path / "dense")
    upcycle.upcycle(source, tmp_path / "moe", upcycle.Recipe())
    found, expected = logits(tmp_path / "moe"), logits(source)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_tokens_spread_unevenly_and_no_expert_starves(dense: Path, tmp_path: Path) -> None:
    assert upcycle.main(["--load-dir", str(dense), "--save-dir", str(tmp_path / "moe")]) == 0
    model = load(tmp_path / "moe")
    assert isinstance(model, MixtralForCausalLM)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    found = shares(model)
    assert found.min() > 0.02 and found.max() > 0.3
    # Every layer has a router of its own.
    assert found.std(0).min() > 0


def test_noise_makes_the_experts_differ_by_its_size(dense: Path, tmp_path: Path) -> None:
    upcycle.upcycle(dense, tmp_path / "moe", upcycle.Recipe(num_experts=3, noise=0.1))
    base, moe = load(dense).model.layers[1].mlp, load(tmp_path / "moe").model.layers[1].mlp
    gate_up = torch.cat([base.gate_proj.weight, base.up_proj.weight])
    difference = moe.experts.gate_up_proj - gate_up
    assert difference.shape[0] == 3
    sizes = difference.square().mean((1, 2)).sqrt() / gate_up.square().mean().sqrt()
    torch.testing.assert_close(sizes, torch.full((3,), 0.1), rtol=0.05, atol=0)
    assert not torch.equal(difference[0], difference[1])
    assert not torch.allclose(logits(tmp_path / "moe"), logits(dense), atol=1e-2)


def test_the_seed_alone_decides(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        upcycle.upcycle(dense, tmp_path / name, upcycle.Recipe(noise=0.1, seed=seed))
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert files["one"] == files["two"] != files["three"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-bias", "add_qkv_bias is True in .*, but False in a Mixtral model"),
        ("qwen3", "qk_layernorm is True"),
        ("mixtral", "has experts already"),
    ],
)
def test_what_mixtral_cannot_compute_is_refused(name: str, words: str, tmp_path: Path) -> None:
    source = make_model(name, tmp_path / "dense")
    with pytest.raises(Refused, match=words):
        upcycle.upcycle(source, tmp_path / "moe", upcycle.Recipe())
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--moe-router-topk", "5"], "--moe-router-topk 5 of --num-experts 4"),
        (["--noise", "-1"], "--noise -1"),
        (["--save-dir", "{dense}"], "lies in the folder to be written"),
        (["--load-dir", "nowhere"], "--load-dir nowhere: no such folder"),
    ],
)
def test_refusals_are_one_sentence(
    dense: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--load-dir", str(dense), "--save-dir", str(tmp_path / "moe"), *words]
    assert upcycle.main([word.format(dense=dense) for word in given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line
