"""Merged weights against PEFT's merge_and_unload, bit for bit, for one adapter and for several."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.canonical import shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.conversion.merge import CastSource, MergedSource, WeightedAdapter
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.errors import Refused
from tests.unit.checkpoint.conftest import build


def peft_adapter(base: Any, folder: Path, seed: int = 3, **config: Any) -> None:
    """An adapter made and saved by PEFT, its factors (a different A for each module) random."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)


def merged_by_peft(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return state


def merged(base: Source, *folders: Path, weights: tuple[float, ...] = (), **options: Any) -> MergedSource:
    factors = weights or (1.0,) * len(folders)
    adapters = [
        WeightedAdapter(AdapterSource(folder, base.shape), weight)
        for folder, weight in zip(folders, factors, strict=True)
    ]
    return MergedSource(base, adapters, **options)


def hf_tensors(source: MergedSource) -> dict[str, torch.Tensor]:
    """Whole tensors by Hugging Face name."""
    tensors: dict[str, torch.Tensor] = {}
    for name in source.names():
        mapping, layer = source.family.mapping(name)
        tensors.update(zip(mapping.names(layer), mapping.split(source.shape, source.read(name)), strict=True))
    return tensors


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ALL, "layers_to_transform": [1, 3]},
        {"target_modules": r".*self_attn.*(k|o)_proj", "init_lora_weights": "gaussian"},
        {"target_modules": ALL, "exclude_modules": ["down_proj"], "lora_dropout": 0.5},
    ],
    ids=["all", "part", "rslora", "layers", "regex", "exclude"],
)
def test_merged_equals_merge_and_unload(model, tmp_path: Path, config: dict[str, Any]):
    peft_adapter(model.load(), tmp_path / "adapter", **config)
    expected = merged_by_peft(model.load(), tmp_path / "adapter")
    base = HfSource(model.path)
    source = merged(base, tmp_path / "adapter")
    changed = 0
    for name in source.names():
        mapping, layer = base.family.mapping(name)
        whole = source.read(name)
        changed += not torch.equal(whole, base.read(name))
        for hf_name, part in zip(mapping.names(layer), mapping.split(base.shape, whole), strict=True):
            assert part.dtype == expected[hf_name].dtype
            assert torch.equal(part, expected[hf_name]), hf_name
    assert changed >= 4


def test_slices_are_those_of_the_whole(models, tmp_path: Path):
    model = models("llama-tied")
    peft_adapter(model.load(), tmp_path, target_modules=ALL)
    base = HfSource(model.path)
    source = merged(base, tmp_path)
    for name in source.names():
        axis, whole = tensor_rule(name).axis, source.read(name)
        if axis is not None:
            half = whole.shape[axis] // 2
            assert torch.equal(source.read(name, axis, [(half, 2 * half)]), whole.narrow(axis, half, half))


def test_adapter_of_another_model_is_refused(models, tmp_path: Path):
    peft_adapter(models("qwen2").load(), tmp_path, target_modules=ALL)
    with pytest.raises(Refused, match=r"k_proj.lora_B.weight has shape \[32, 4\]; .* needs \[16, 4\]"):
        AdapterSource(tmp_path, HfSource(models("llama").path).shape)


def test_cast(models):
    base = HfSource(models("llama").path)
    source = CastSource(base, torch.bfloat16)
    assert source.shape.params_dtype == "bfloat16"
    for name in source.names():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), base.read(name).bfloat16())


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are larger than a block and have rows that no block size divides."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=330,
        intermediate_size=1114,
        num_hidden_layers=1,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=62,
        vocab_size=31,
    )
    folder = tmp_path_factory.mktemp("odd")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [1, 4, 33])
def test_blocks_and_shards_have_the_bits_of_the_whole(odd: Path, tmp_path: Path, monkeypatch, rank: int):
    from transformers import AutoModelForCausalLM

    for name, value in (("BLOCK_BYTES", 1), ("BLOCK_COLUMNS", 256)):
        monkeypatch.setattr(f"mindspeed_lora.checkpoint.conversion.low_rank.{name}", value)
    load = AutoModelForCausalLM.from_pretrained
    peft_adapter(load(odd), tmp_path, target_modules=ALL, r=rank)
    expected = merged_by_peft(load(odd), tmp_path)
    source = merged(HfSource(odd), tmp_path)
    found = hf_tensors(source)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name in source.names():
        rule, whole = tensor_rule(name), source.read(name)
        for rank_of_two in range(2 if rule.axis is not None and whole.shape[rule.axis] % 2 == 0 else 0):
            ranges = shard_ranges(rule, whole.shape[rule.axis or 0], rank_of_two, 2)
            cut = [whole.narrow(rule.axis or 0, start, stop - start) for start, stop in ranges]
            assert torch.equal(source.read(name, rule.axis, ranges), torch.cat(cut, dim=rule.axis or 0))


def test_several_adapters_equal_a_weighted_adapter_of_peft(models, tmp_path: Path):
    from peft import PeftModel

    model, weights = models("llama"), (0.7, -1.5, 2.0)
    configs: list[dict[str, Any]] = [
        {"target_modules": ALL, "r": 4},
        {"target_modules": ["q_proj", "up_proj"], "r": 7, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["v_proj", "down_proj"], "r": 2, "layers_to_transform": [1]},
    ]
    folders = [tmp_path / str(number) for number in range(3)]
    for number, config in enumerate(configs):
        peft_adapter(model.load(), folders[number], seed=number, **config)
    peft = PeftModel.from_pretrained(model.load(), folders[0], adapter_name="0")
    for number in (1, 2):
        peft.load_adapter(folders[number], adapter_name=str(number))
    peft.add_weighted_adapter(["0", "1", "2"], list(weights), "all", combination_type="cat")
    peft.set_adapter("all")
    expected = peft.merge_and_unload(adapter_names=["all"]).state_dict()
    source = merged(HfSource(model.path), *folders, weights=weights)
    found, before = hf_tensors(source), model.tensors
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 4e-6 * (1 + tensor.abs().max()), name
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) == 4 * 7

    name = "model.layers.1.self_attn.q_proj"
    one, two = (AdapterSource(folder, source.shape).factors(name) for folder in folders[:2])
    first, second = ((b @ a) * (s * w) for (a, b, s), w in zip((one, two), weights, strict=False))
    assert torch.equal(found[f"{name}.weight"], before[f"{name}.weight"] + (first + second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_and_casting_round_once(models, tmp_path: Path, dtype: torch.dtype):
    model = models("llama-tied")
    base = HfSource(model.path)
    assert base.shape.params_dtype == "bfloat16"
    peft_adapter(model.load(), tmp_path, target_modules=ALL, modules_to_save=["norm"])
    exact = merged_by_peft(model.load().float(), tmp_path)
    source = merged(base, tmp_path, dtype=dtype)
    assert source.shape.params_dtype == str(dtype).removeprefix("torch.")
    twice = 0
    for name, tensor in hf_tensors(source).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[name].to(dtype)), name
        twice += not torch.equal(tensor, exact[name].bfloat16().to(dtype))
    assert dtype == torch.bfloat16 or twice >= 4 * 7


def test_trained_biases_and_rows_are_rounded_once(models, tmp_path: Path):
    """A bfloat16 base and a float32 adapter that holds part of a fused bias, and rows of the embedding."""
    model = build("llama-biased", tmp_path / "base")
    model.load().bfloat16().save_pretrained(model.path)
    peft_adapter(
        model.load(),
        tmp_path / "adapter",
        target_modules=["q_proj"],
        bias="lora_only",
        trainable_token_indices=[3, 5],
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: torch.randn(tensor.shape) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    found = hf_tensors(merged(HfSource(model.path), tmp_path / "adapter", dtype=torch.float32))
    kinds = [name for name in tensors if name.endswith("q_proj.base_layer.bias")]
    assert len(kinds) == 4
    for name in kinds:
        hf_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(found[hf_name], tensors[name])
    rows = next(tensor for name, tensor in tensors.items() if "trainable_tokens_delta" in name)
    assert torch.equal(found["model.embed_tokens.weight"][[3, 5]], rows)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mistral"])
def test_unmerged_is_the_base_up_to_rounding_and_says_how_far(models, tmp_path: Path, kind: str):
    model = models(kind)
    peft_adapter(model.load(), tmp_path / "adapter", target_modules=ALL)
    base = HfSource(model.path)
    together = build_from(model.path, hf_tensors(merged(base, tmp_path / "adapter")), tmp_path / "merged")
    source = merged(HfSource(together), tmp_path / "adapter", unmerge=True)
    apart = build_from(together, hf_tensors(source), tmp_path / "apart")
    again = hf_tensors(merged(HfSource(apart), tmp_path / "adapter"))
    assert source.residual is not None
    eps = torch.finfo(base.dtype(base.names()[0])).eps
    lost = 0.0
    for name, tensor in hf_tensors(merged(HfSource(together), tmp_path / "adapter")).items():
        stored = load_file(together / "model.safetensors")[name]
        found = load_file(apart / "model.safetensors")[name]
        assert (
            found.float() - model.tensors[name].float()
        ).abs().max() <= 2 * eps * tensor.float().abs().max()
        lost = max(lost, float((again[name].float() - stored.float()).abs().max()))
    assert source.residual.difference == lost


def test_what_taking_out_loses_is_told(models, tmp_path: Path):
    """Where B·A is larger than W, digits of W are lost: of a model that the adapter was never merged into."""
    model = models("llama")
    peft_adapter(model.load(), tmp_path / "adapter", target_modules=ALL, lora_alpha=600)
    source = merged(HfSource(model.path), tmp_path / "adapter", unmerge=True)
    apart = build_from(model.path, hf_tensors(source), tmp_path / "apart")
    again = hf_tensors(merged(HfSource(apart), tmp_path / "adapter"))
    lost = {name: float((again[name] - tensor).abs().max()) for name, tensor in model.tensors.items()}
    assert source.residual is not None
    assert source.residual.difference == max(lost.values()) > 1e-7
    assert f"difference of at most {max(lost.values()):.3g} (" in source.residual.sentence()


def build_from(config: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """A folder with the configuration of one and these tensors."""
    folder.mkdir()
    shutil.copy(config / "config.json", folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


_MEASURE = """
import sys
from pathlib import Path
from mindspeed_lora.checkpoint.conversion.merge import MergedSource, WeightedAdapter
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.peft.source import AdapterSource

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

base = HfSource(Path(sys.argv[1]))
source = MergedSource(base, [WeightedAdapter(AdapterSource(sys.argv[2], base.shape))])
source.read("decoder.layers.0.mlp.linear_fc2.weight", 0, [(0, 8)])
Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
before = status("VmRSS")
merged = source.read("decoder.layers.0.mlp.linear_fc1.weight")
print(status("VmHWM") - before, merged.numel() * merged.element_size())
"""


def test_a_merge_takes_the_tensor_and_little_more(tmp_path: Path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=8, vocab_size=8
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["gate_proj", "up_proj", "down_proj"], r=16)
    del model
    paths = [str(tmp_path / name) for name in ("base", "adapter")]
    run = subprocess.run([sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True)
    taken, size = map(int, run.stdout.split())
    assert size == 128 << 20
    # A block in float32 and what it is summed from.
    assert 0.9 * size <= taken <= size + (80 << 20)
