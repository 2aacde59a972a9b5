"""A base with what an adapter or added tokens change of it, read whole and by ranges."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.peft.adapted import AdaptedSource
from mindspeed_lora.checkpoint.peft.plan import check_tokens, plan_adapter
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.errors import Refused
from tests.support.adapters import new_adapter, write

VOCAB = 101


def adapter_on(source: HfSource, folder: Path, tokens: tuple[int, ...] = (), **flags: Any) -> tuple[Any, Any]:
    """An adapter with random values, opened, and these values."""
    lora = LoraConfig(lora_r=2, lora_alpha=2, lora_target_modules=("q_proj",), **flags)
    plan = plan_adapter(lora, source.shape, 1, new_tokens=tokens)
    assert plan is not None
    values = write(folder, plan.shape, plan)
    return AdapterSource(folder, source.shape), values


def test_new_words_start_as_the_mean(models: Any) -> None:
    base = HfSource(models("llama").path)
    source = AdaptedSource(base, dataclasses.replace(base.shape, vocab_size=VOCAB + 2), None)
    for name in (EMBEDDING, OUTPUT_LAYER):
        whole, before = source.read(name), base.read(name)
        assert torch.equal(whole[:VOCAB], before)
        torch.testing.assert_close(whole[VOCAB:], before.mean(dim=0).expand(2, -1))
        cut = source.read(name, 0, [(3, 5), (VOCAB - 1, VOCAB + 1), (VOCAB + 1, VOCAB + 4)])
        assert torch.equal(cut[:-2], torch.cat([whole[3:5], whole[-3:-1], whole[-1:]])) and not cut[-2:].any()


def test_rows_of_tokens_stand_in_their_places(models: Any, tmp_path: Path) -> None:
    base = HfSource(models("llama").path)
    adapter, values = adapter_on(base, tmp_path, (VOCAB + 1, 7))
    assert adapter.shape.vocab_size == VOCAB + 2 and adapter.has_own_words
    source = AdaptedSource(base, adapter.shape, adapter)
    for name in (EMBEDDING, OUTPUT_LAYER):
        rows = values[f"{name.removesuffix('.weight')}.token_rows"]
        whole = source.read(name)
        assert torch.equal(whole[[VOCAB + 1, 7]], rows)
        assert torch.equal(whole[8:VOCAB], base.read(name)[8:])
        assert torch.equal(
            source.read(name, 0, [(5, 9), (VOCAB, VOCAB + 2)]), torch.cat([whole[5:9], whole[-2:]])
        )


def test_a_tied_output_layer_comes_apart(models: Any, tmp_path: Path) -> None:
    base = HfSource(models("llama-tied").path)
    adapter, values = adapter_on(base, tmp_path, lora_modules_to_save=("embed_tokens", "norm"))
    plan = plan_adapter(LoraConfig(lora_load=str(tmp_path)), base.shape, 1)
    assert plan is not None
    source = AdaptedSource(base, plan.shape, adapter)
    assert torch.equal(source.read(OUTPUT_LAYER), base.read(EMBEDDING))
    for name, value in values.items():
        if "lora" not in name:
            assert torch.equal(source.read(name), value) and source.dtype(name) is torch.float32
    assert torch.equal(source.read(EMBEDDING, 0, [(1, 3), (99, 104)])[:4], values[EMBEDDING][[1, 2, 99, 100]])
    assert source.dtype(OUTPUT_LAYER) is torch.bfloat16


def test_some_matrices_of_a_fused_bias(models: Any, tmp_path: Path) -> None:
    base = HfSource(models("llama-biased").path)
    adapter, values = adapter_on(base, tmp_path, lora_bias="lora_only")
    source, name = AdaptedSource(base, base.shape, adapter), "decoder.layers.1.self_attention.linear_qkv.bias"
    mapping, _ = base.family.mapping(name)
    expected = [mapping.split(base.shape, whole) for whole in (values[name], base.read(name))]
    found = mapping.split(base.shape, source.read(name))
    assert torch.equal(found[0], expected[0][0])
    assert torch.equal(found[1], expected[1][1]) and torch.equal(found[2], expected[1][2])
    half = [(0, found[0].numel() // 2)]
    assert torch.equal(source.read(name, 0, half), source.read(name)[: half[0][1]])


class TestTokens:
    def test_whole_vocabularies_need_no_rows(self, models: Any, tmp_path: Path) -> None:
        base = HfSource(models("llama").path)
        adapter, _ = adapter_on(base, tmp_path, (VOCAB,), lora_modules_to_save=("embed_tokens", "lm_head"))
        assert not adapter.spec.token_rows and adapter.shape.vocab_size == VOCAB + 1 and adapter.has_own_words
        adapter, _ = adapter_on(base, tmp_path, (VOCAB,), lora_modules_to_save=("lm_head",))
        assert [rows.tensor for rows in adapter.spec.token_rows] == [EMBEDDING]

    def test_one_end_of_a_tied_model(self, models: Any, tmp_path: Path) -> None:
        base = HfSource(models("llama-tied").path)
        with pytest.raises(Refused, match="name both embed_tokens and lm_head there, or none"):
            adapter_on(base, tmp_path, (VOCAB,), lora_modules_to_save=("lm_head",))

    def test_a_loaded_adapter_has_its_own(self, models: Any, tmp_path: Path) -> None:
        base = HfSource(models("llama-tied").path)
        adapter_on(base, tmp_path / "with", (VOCAB, 4))
        adapter_on(base, tmp_path / "without")
        with_rows, without = (
            plan_adapter(LoraConfig(lora_load=str(tmp_path / name)), base.shape, 1)
            for name in ("with", "without")
        )
        assert with_rows is not None and without is not None
        assert with_rows.notices == (
            f"{tmp_path}/with: the vocabulary grows from {VOCAB} to {VOCAB + 1} words",
        )
        check_tokens(with_rows, (VOCAB, 4))
        check_tokens(without, ())
        for plan, words in ((with_rows, "trains other tokens"), (without, "trains no added tokens")):
            with pytest.raises(Refused, match=f"--add-tokens: contradicting .*{words}"):
                check_tokens(plan, (VOCAB,))

    @pytest.mark.parametrize(
        ("indices", "flags", "words"),
        [
            ({"norm": [1]}, {}, "trainable_token_indices of 'norm' is not supported"),
            ({"lm_head": [1]}, {}, "are not the same for the embedding and the output layer"),
            (
                [1],
                {"modules_to_save": ["embed_tokens"]},
                "rows of model.embed_tokens cannot be trained beside",
            ),
        ],
    )
    def test_rows_that_are_refused(
        self, models: Any, tmp_path: Path, indices: Any, flags: dict[str, Any], words: str
    ) -> None:
        import json

        base = HfSource(models("llama-tied").path)
        adapter_on(base, tmp_path)
        file = tmp_path / "adapter_config.json"
        config = {**json.loads(file.read_text()), "trainable_token_indices": indices, **flags}
        file.write_text(json.dumps(config))
        with pytest.raises(Refused, match=words):
            AdapterSource(tmp_path, base.shape)


def test_a_vocabulary_of_another_size_within_one_adapter(models: Any, tmp_path: Path) -> None:
    base = HfSource(models("llama").path)
    plan = new_adapter(base.shape, lora_modules_to_save=("embed_tokens", "lm_head"))
    write(tmp_path, base.shape, plan)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.weight"
    save_file({**tensors, name: torch.zeros(VOCAB + 1, tensors[name].size(1))}, file)
    with pytest.raises(
        Refused, match=rf"embed_tokens.weight has shape \[{VOCAB}, 32\]; this base model needs"
    ):
        AdapterSource(tmp_path, base.shape)
