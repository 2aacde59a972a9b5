"""verify: equal across formats and layouts, each kind of difference found where it is, damage named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.conversion import compare
from mindspeed_lora.checkpoint.conversion.compare import Difference, compare_rows, row_pieces

GATE = "model.layers.3.mlp.gate_proj.weight"
FC1 = "decoder.layers.3.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def mg(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untied Llama at TP 2 × PP 2 with uneven stages; tests must not change it."""
    from mindspeed_lora.checkpoint.conversion.convert import convert
    from mindspeed_lora.config.commands import parse

    folder = tmp_path_factory.mktemp("verify") / "mg"
    line = f"--load-dir {models('llama').path} --save-dir {folder} --save-model-type mg --num-layer-list 1,3"
    line += (
        " --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --make-vocab-size-divisible-by 8"
    )
    convert(parse("convert", line.split()))
    return folder


def change(folder: Path, name: str, edit: Any) -> None:
    """Edit one tensor of a model's only file, by the safetensors library."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors, name)
    save_file(tensors, folder / "model.safetensors")


def set_value(row: int, column: int, value: float) -> Any:
    def edit(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name][row, column] = value

    return edit


def test_every_family_is_equal_to_its_other_form(model, tmp_path: Path, run_convert, command) -> None:
    run_convert(
        load_dir=model.path, save_dir=tmp_path / "mg", save_model_type="mg", target_tensor_parallel_size=2
    )
    outcome = command("verify", model.path, tmp_path / "mg")
    assert outcome.status == 0
    assert outcome.last.startswith("equal: all ") and outcome.last.endswith("bit by bit")
    assert "checksums: 2 files fit" in outcome.out and "checksums: none kept" in outcome.out


def test_a_changed_value_is_found_in_any_layout(own_model, mg: Path, command, monkeypatch) -> None:
    # So small that a piece is a few rows, and the difference in the last of many.
    monkeypatch.setattr(compare, "PIECE_BYTES", 600)
    before = own_model.tensors[GATE][47, 31].item()
    change(own_model.path, GATE, set_value(47, 31, 5.0))
    outcome = command("verify", own_model.path, mg, "--json")
    found = json.loads(outcome.out)
    assert (outcome.status, found["verdict"], found["bit_equal"]) == (1, "different", 26)
    (difference,) = found["differences"]
    assert (difference["name"], difference["kind"], difference["num_values"]) == (FC1, "values", 1)
    assert difference["position"] == [47, 31]
    assert difference["absolute"] == pytest.approx(5.0 - before, rel=1e-6)
    assert difference["relative"] == pytest.approx((5.0 - before) / 5.0, rel=1e-6)
    assert found["largest"]["name"] == FC1
    text = command("verify", own_model.path, mg)
    assert text.last.startswith("different: of 27 tensors 1 with other values; largest difference")
    assert command("verify", own_model.path, mg, "--tolerance", "0.5").status == 1
    within = command("verify", own_model.path, mg, "--tolerance", 1.5)
    assert (within.status, within.last.split(":")[0]) == (0, "equal within --tolerance 1.5")


def test_other_dtype_with_equal_values(models, tmp_path: Path, run_convert, command) -> None:
    model = models("llama-tied").path
    run_convert(load_dir=model, save_dir=tmp_path / "mg", save_model_type="mg", params_dtype="fp32")
    outcome = command("verify", model, tmp_path / "mg")
    assert outcome.status == 1
    assert outcome.last == "different: of 26 tensors 26 with equal values, other dtype"
    assert "equal values, other dtype: bfloat16 and float32" in outcome.out
    assert command("verify", model, tmp_path / "mg", "--tolerance", "0").status == 0


def test_nan_and_bits(own_model, models, mg: Path, tmp_path: Path, command) -> None:
    change(own_model.path, GATE, set_value(0, 0, float("nan")))
    found = json.loads(command("verify", own_model.path, mg, "--json", "--tolerance", "9").out)
    (difference,) = found["differences"]
    assert (found["verdict"], difference["num_nan"], difference["absolute"]) == ("different", 1, None)
    copy = shutil.copytree(own_model.path, tmp_path / "copy")
    assert command("verify", own_model.path, copy).last.startswith("equal: all 27")

    def other_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name].view(torch.int32)[0, 0] = 0x7FC00001

    change(copy, GATE, other_nan)
    outcome = command("verify", own_model.path, copy)
    assert (outcome.status, outcome.last) == (1, "different: of 27 tensors 1 with equal values, other bits")
    assert command("verify", own_model.path, copy, "--tolerance", 0).status == 0


def test_infinities_are_equal_only_to_themselves() -> None:
    class One:
        def __init__(self, *values: float) -> None:
            self.tensor = torch.tensor([values])

        def names(self) -> list[str]:
            return ["w"]

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.tensor.shape)

        def dtype(self, name: str) -> torch.dtype:
            return self.tensor.dtype

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return self.tensor[start:stop]

    inf = float("inf")
    same = compare_rows(One(inf, 1.0), One(inf, 3.0), "w", 1)
    assert same == Difference("w", num_values=1, num_bits=1, largest=2.0, magnitude=3.0, position=(0, 1))
    other = compare_rows(One(inf, 1.0), One(-inf, 1.0), "w", 1)
    assert other is not None and other.largest == inf and not other.is_within(100.0)
    assert compare_rows(One(-0.0), One(-0.0), "w", 1) is None
    zero = compare_rows(One(-0.0), One(0.0), "w", 1)
    assert zero is not None and zero.kind == "bits"


def test_pieces_are_bounded_and_cover_every_row() -> None:
    pieces = list(row_pieces((128256, 8192), 4))
    assert max(stop - start for start, stop in pieces) * 8192 * 4 <= 64 << 20
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == 128256
    assert list(row_pieces((3, 1 << 30), 4)) == [(0, 1), (1, 2), (2, 3)]


def test_what_one_side_lacks(models, own_model, tmp_path: Path, command) -> None:
    tied = json.loads((own_model.path / "config.json").read_text())
    (own_model.path / "config.json").write_text(json.dumps({**tied, "tie_word_embeddings": True}))
    change(own_model.path, "lm_head.weight", lambda tensors, name: tensors.pop(name))
    outcome = command("verify", models("llama").path, own_model.path)
    assert outcome.status == 1
    assert "output_layer.weight: only in A" in outcome.out
    qwen = command("verify", models("qwen2").path, models("llama").path)
    assert "linear_qkv.weight: shapes [96, 32] and [64, 32]" in qwen.out
    assert "linear_qkv.bias: only in A" in qwen.out


def test_a_vocabulary_known_only_with_its_padding(models, mg: Path, tmp_path: Path, command) -> None:
    copy = shutil.copytree(mg, tmp_path / "copy")
    shutil.rmtree(copy / "hf_config")
    (copy / "checksums.json").unlink()
    for file in copy.rglob("*.pt"):
        content = torch.load(file, weights_only=False)
        del content["args"].vocab_size
        torch.save(content, file)
    outcome = command("verify", models("llama").path, copy)
    assert outcome.status == 0, outcome.out
    assert "those from 101 on are zeros that pad the vocabulary" in outcome.out
    content = torch.load(file := copy / "iter_0000001/mp_rank_01_000/model_optim_rng.pt", weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][-1, 0] = 1.0
    torch.save(content, file)
    outcome = command("verify", models("llama").path, copy)
    assert outcome.status == 1 and "shapes [101, 32] and [112, 32]" in outcome.out


def test_a_flipped_byte_is_named(models, mg: Path, tmp_path: Path, command) -> None:
    copy = shutil.copytree(mg, tmp_path / "copy")
    file = copy / "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    manifest = json.loads((copy / "checksums.json").read_text())
    tensors = manifest["files"]["iter_0000001/mp_rank_01_001/model_optim_rng.pt"]["tensors"]
    name = next(one for one in tensors if one.endswith("layers.2.mlp.linear_fc1.weight"))
    data = bytearray(file.read_bytes())
    data[tensors[name][0] + 7] ^= 0x10
    file.write_bytes(data)
    for words in ((models("llama").path, copy), (copy, models("llama").path), (copy,)):
        outcome = command("verify", *words)
        assert outcome.status == 1
        assert outcome.last.startswith(f"damaged: {file}: tensor {name} ")
    (copy / "checksums.json").unlink()
    outcome = command("verify", models("llama").path, copy)
    assert outcome.status == 1 and outcome.last.endswith(f"in {FC1}")
    assert "keeps no checksums.json to check" in command("verify", copy).refusal


def test_one_folder_is_checked_by_its_own_checksums(mg: Path, command) -> None:
    outcome = command("verify", mg)
    assert (outcome.status, outcome.last) == (0, "intact: 4 files fit their checksums")
    found = json.loads(command("verify", mg / "iter_0000001", "--json").out)
    assert (found["verdict"], found["sides"][0]["checksums"]) == ("intact", 4)


def test_adapters(peft_adapter, models, trained: Path, tmp_path: Path, command) -> None:
    one = peft_adapter()
    copy = shutil.copytree(one, tmp_path / "copy")
    assert command("verify", one, copy).last == "equal: all 16 tensors, bit by bit"
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    outcome = command("verify", one, copy)
    assert (outcome.status, outcome.last) == (1, "different: of 16 tensors 8 modules scaled otherwise")
    assert "layers.0.self_attn.q_proj: scaled by 2 and 4" in outcome.out
    assert "is an adapter, and" in command("verify", one, models("llama").path).refusal
    assert command("verify", one, models("llama").path).status == 2


def test_training_folders(trained: Path, tiny, command) -> None:
    newest = trained / "iter_0000002"
    outcome = command("verify", trained, newest)
    assert outcome.status == 0 and "r 4, alpha 8" in outcome.out and "mg TP 1" in outcome.out
    # The base is frozen, the adapter has moved on.
    found = json.loads(command("verify", newest, trained / "iter_0000001", "--json").out)
    assert found["verdict"] == "different"
    assert all(".lora_" in one["name"] for one in found["differences"])
    base = command("verify", tiny.model, trained)
    assert base.status == 0
    assert "note: B's adapter is not compared: the other side has none" in base.out
    assert command("verify", trained / "adapter", trained).status == 0


@pytest.mark.parametrize("words", [("nothing", "nothing"), ("{model}", "nothing"), ("{model}", "{file}")])
def test_what_is_no_checkpoint_is_refused(models, command, words: tuple[str, str]) -> None:
    model = models("llama").path
    outcome = command("verify", *(word.format(model=model, file=model / "config.json") for word in words))
    assert outcome.status == 2
    assert outcome.refusal.startswith("error: verify ")
