"""convert_ckpt.py on models with experts: any layout there and back, bit by bit, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.conversion.inspect import describe_folder
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.errors import Refused
from tests.support.moe_models import EXPERTS, KINDS, WIDTH, moe_model

Convert = Callable[..., None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a kind, built once."""
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            dtype = torch.bfloat16 if kind == "qwen2_moe" else torch.float32
            built[kind] = moe_model(kind, tmp_path_factory.mktemp("moe") / kind, dtype)
        return built[kind]

    return get


def assert_same_bits(found: Path, expected: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert set(one) == set(two)
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


def random_layout(generator: random.Random) -> list[str]:
    """The flags of a layout that the models fit."""
    tp, pp, ep = generator.choice([1, 2, 4]), generator.choice([1, 2]), generator.choice([1, 2])
    words = [
        *("--target-tensor-parallel-size", str(tp)),
        *("--target-pipeline-parallel-size", str(pp)),
        *("--target-expert-parallel-size", str(ep)),
    ]
    etp = generator.choice([None, 1, tp, "extended"])
    if etp == "extended":
        # Four experts: no more blocks than those.
        words += ["--moe-tp-extend-ep"] if tp * ep <= EXPERTS else []
    elif etp is not None:
        words += ["--expert-tensor-parallel-size", str(etp)]
    if pp == 2 and generator.random() < 0.5:
        words += ["--num-layers-per-virtual-pipeline-stage", "1"]
    if generator.random() < 0.5:
        words += ["--moe-grouped-gemm"]
    if generator.random() < 0.5:
        words += ["--transformer-impl", "transformer_engine"]
    return words


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_layout_there_and_back(
    kind: str, seed: int, folders: Callable[[str], Path], tmp_path: Path, run_convert: Convert
):
    """hf → mg → torch_dist → mg → hf, each in a layout of its own."""
    generator, folder = random.Random(f"{kind} {seed}"), folders(kind)
    source = folder
    for number, kind_of_target in enumerate(("mg", "torch_dist", "mg")):
        target = tmp_path / str(number)
        run_convert(
            *("--load-dir", source, "--save-dir", target, "--save-model-type", kind_of_target),
            *random_layout(generator),
        )
        source = target
    run_convert(load_dir=source, save_dir=tmp_path / "out", save_model_type="hf")
    assert_same_bits(tmp_path / "out" / "mg2hf", folder)


def test_the_words_of_published_scripts(folders: Callable[[str], Path], tmp_path: Path, run_convert: Convert):
    """The flags of the scripts that convert Qwen3-30B-A3B, with this model's numbers."""
    folder = folders("qwen3_moe")
    run_convert(
        *("--model-type", "GPT", "--use-mcore-models", "--load-model-type", "hf", "--save-model-type", "mg"),
        *("--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 2),
        *("--target-expert-parallel-size", 2, "--expert-tensor-parallel-size", 1, "--moe-grouped-gemm"),
        *("--num-experts", EXPERTS, "--moe-ffn-hidden-size", WIDTH, "--moe-layer-freq", "[0,1]*2"),
        *("--norm-topk-prob", "--model-type-hf", "qwen3-moe", "--params-dtype", "fp32"),
        *("--load-dir", folder, "--save-dir", tmp_path / "mg"),
    )
    report = describe_folder(tmp_path / "mg", False)["model"]
    assert (report["layout"]["pp"], report["layout"]["ep"], report["layout"]["etp"]) == (2, 2, 1)
    assert report["experts"]["num_experts"] == EXPERTS and report["experts"]["dense_layers"] == (0, 2)
    assert open_source(tmp_path / "mg").shape == open_source(folder).shape


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "EP that does not divide": (
        "mixtral",
        ["--target-expert-parallel-size", "3"],
        "4 experts; use 1, 2 or 4",
    ),
    "EP of a dense model": ("llama", ["--target-expert-parallel-size", "2"], "has no experts; leave it out"),
    "ETP that does not divide TP": (
        "mixtral",
        ["--expert-tensor-parallel-size", "2"],
        "does not divide --target-tensor-parallel-size 1",
    ),
    "ETP that does not divide the width": (
        "mixtral",
        ["--target-tensor-parallel-size", "1", "--expert-tensor-parallel-size", "5"],
        "does not divide the 24 columns",
    ),
    "two words for ETP": (
        "mixtral",
        ["--moe-tp-extend-ep", "--expert-tensor-parallel-size", "2"],
        "--moe-tp-extend-ep leaves each expert whole",
    ),
    "extended EP": (
        "mixtral",
        ["--moe-tp-extend-ep", "--target-tensor-parallel-size", "4", "--target-expert-parallel-size", "2"],
        "x --target-tensor-parallel-size 4 of --moe-tp-extend-ep does not divide",
    ),
    "other number of experts": ("mixtral", ["--num-experts", "8"], r"--num-experts 8 (checkpoint: 4)"),
    "other experts for a token": ("mixtral", ["--moe-router-topk", "1"], "--moe-router-topk 1"),
    "other dense layers": ("glm4_moe", ["--first-k-dense-replace", "1"], "--first-k-dense-replace"),
    "a gate that is not there": ("glm4_moe", ["--shared-expert-gate"], "--shared-expert-gate"),
}


@pytest.mark.parametrize(("kind", "words", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    kind: str,
    words: list[str],
    message: str,
    folders: Callable[[str], Path],
    models: Callable[[str], Any],
    tmp_path: Path,
    run_convert: Convert,
):
    folder = models("llama").path if kind == "llama" else folders(kind)
    with pytest.raises(Refused) as error:
        run_convert("--load-dir", folder, "--save-dir", tmp_path / "mg", "--save-model-type", "mg", *words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "mg").exists()


def test_more_expert_ranks_than_tensor_ranks_in_a_distributed_checkpoint(
    folders: Callable[[str], Path], tmp_path: Path, run_convert: Convert
):
    run_convert(
        *("--load-dir", folders("mixtral"), "--save-dir", tmp_path / "mg", "--save-model-type", "torch_dist"),
        *("--expert-tensor-parallel-size", "2", "--target-expert-parallel-size", "2"),
    )
    assert len(list((tmp_path / "mg" / "iter_0000001").glob("*.distcp"))) == 4
    run_convert(load_dir=tmp_path / "mg", save_dir=tmp_path / "out", save_model_type="hf")
    assert_same_bits(tmp_path / "out" / "mg2hf", folders("mixtral"))


def test_inspect_verify_and_dry_run(
    folders: Callable[[str], Path], tmp_path: Path, run_convert: Convert, command: Any, capsys: Any
):
    flags = ["--load-dir", folders("glm4_moe"), "--save-dir", tmp_path / "mg", "--save-model-type", "mg"]
    flags += ["--target-expert-parallel-size", "2", "--target-tensor-parallel-size", "2"]
    flags += ["--expert-tensor-parallel-size", "1"]
    run_convert(*flags, "--dry-run")
    planned = capsys.readouterr().out
    assert "mp_rank_01_001/model_optim_rng.pt" in planned and not (tmp_path / "mg").exists()
    run_convert(*flags)
    capsys.readouterr()
    seen = command("inspect", tmp_path / "mg")
    assert seen.status == 0 and "TP 2 × PP 1 × EP 2 × ETP 1" in seen.out
    assert "4 of width 24, a token takes 2, shared of 48; 2 layers without" in seen.out
    compared = command("verify", folders("glm4_moe"), tmp_path / "mg")
    assert compared.status == 0, compared.out
    tensors = describe_folder(tmp_path / "mg", True)["tensors"]
    one = next(one for one in tensors if "local_experts.3.linear_fc1" in one["name"])
    assert [part["file"] for part in one["parts"]] == ["iter_0000001/mp_rank_01_001/model_optim_rng.pt"]
    assert json.dumps(tensors)
