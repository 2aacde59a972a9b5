"""What is a hub id and what a path, and what is downloaded how often."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_lora import hub as hub_module
from mindspeed_lora.config.commands import parse
from mindspeed_lora.hub import HubId, hub_id, with_local_folders
from tests.support.hub import Hub, serve_hub

SAYS = """
import json, sys
from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.hub import with_local_folders
try:
    job, notices = with_local_folders(parse(sys.argv[1], sys.argv[2:]))
except Refused as error:
    sys.exit(f"error: {error}")
section = job.checkpoint if sys.argv[1] == "posttrain" else job.preprocess
print(json.dumps([getattr(section, "load", None) or section.input, job.tokenizer.tokenizer_name_or_path, notices]))
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", HubId("Qwen/Qwen2.5-0.5B", None, "huggingface")),
        ("Qwen/Qwen2.5-0.5B@v1", HubId("Qwen/Qwen2.5-0.5B", "v1", "huggingface")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1", "huggingface")),
        ("hf://org/name", HubId("org/name", None, "huggingface")),
        ("modelscope://org/name@master", HubId("org/name", "master", "modelscope")),
    ],
)
def test_ids(text: str, expected: HubId) -> None:
    assert hub_id(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("model", "/org/name", "./org/name", "../org/name", "~/name", "a/b/c", "org/name/", "org//name", ""),
        *("data/rows.jsonl", "data/alpaca.parquet", "ckpt/model.safetensors", "org/na me", "your model path"),
    ],
)
def test_paths(text: str) -> None:
    assert hub_id(text) is None


def test_what_is_on_the_disk_is_a_path(tmp_path: Path) -> None:
    """So is a mistyped name below a folder that is there."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("org/nmae") is None
    assert hub_id("hf://org/nmae") is not None


def test_modelscope_by_the_environment() -> None:
    assert hub_id("org/name", {"USE_MODELSCOPE_HUB": "1"}) == HubId("org/name", None, "modelscope")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model, rows = tmp_path / "m", tmp_path / "d"
    model.mkdir()
    rows.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "modeling.py"):
        (model / name).write_text(json.dumps(name))
    (rows / "train.jsonl").write_text("{}\n")
    with serve_hub({"models/org/small": model, "datasets/org/rows": rows}) as served:
        yield served


def start(hub: Hub, home: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HF_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", SAYS, *words],
        env={**path, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


POSTTRAIN = ("posttrain", "--data-path", "rows", "--load")


def test_one_rank_of_a_node_downloads(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ranks = [
        start(hub, home, *POSTTRAIN, "org/small@v1", LOCAL_RANK=str(rank), RANK=str(rank))
        for rank in range(3)
    ]
    said = [rank.communicate() for rank in ranks]
    folders = {json.loads(out)[0] for out, _ in said}
    assert len(folders) == 1, said
    folder = Path(folders.pop())
    assert folder.name == hub.commit("models/org/small") and "models--org--small" in str(folder)
    names = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names, "no pickles beside safetensors, no code"
    assert [hub.downloads(name) for name in sorted(names)] == [1, 1, 1]
    offline, _ = start(hub, home, *POSTTRAIN, "org/small@v1", HF_HUB_OFFLINE="1").communicate()
    asked = len(hub.requests)
    assert json.loads(offline)[0] == str(folder)
    _, error = start(hub, home, *POSTTRAIN, "org/other", HF_HUB_OFFLINE="1").communicate()
    assert "HF_HUB_OFFLINE is set" in error and "no such folder here" in error
    assert len(hub.requests) == asked
    dry, _ = start(hub, tmp_path / "empty", *POSTTRAIN, "org/small", "--dry-run").communicate()
    assert json.loads(dry)[0] == "org/small" and len(hub.requests) == asked


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    expected = {"org/smal": "has no such model", "org/small@v9": "no such revision"}
    started = {name: start(hub, tmp_path / "home", *POSTTRAIN, name) for name in expected}
    for name, process in started.items():
        out, error = process.communicate()
        assert process.returncode == 1 and not out
        assert f"--load {name}: no such folder here" in error and expected[name] in error
        assert len(error.strip().splitlines()) == 1, error


def test_rows_and_tokenizer(hub: Hub, tmp_path: Path) -> None:
    words = (
        "--input",
        "org/rows, here.jsonl",
        "--output-prefix",
        "out",
        "--tokenizer-name-or-path",
        "org/small",
    )
    process = start(hub, tmp_path / "home", "preprocess", *words)
    out, error = process.communicate()
    given, tokenizer, notices = json.loads(out)
    rows, _, local = given.partition(",")
    assert local == "here.jsonl", "each of several inputs may be an id"
    assert [path.name for path in Path(rows).iterdir()] == ["train.jsonl"]
    assert {path.name for path in Path(tokenizer).iterdir()} == {"config.json", "tokenizer.json"}, error
    assert len(notices) == 2 and "of the hub" in notices[0]


def test_names_in_dataset_info_are_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a hub is asked")

    monkeypatch.setattr(hub_module, "_snapshot", never)
    words = ["--input", "data/alpaca,other/rows", "--tokenizer-name-or-path", "/tok", "--output-prefix", "o"]
    job = parse("preprocess", [*words, "--handler-name", "LlamaFactoryInstructionHandler"])
    assert with_local_folders(job)[0].preprocess.input == "data/alpaca,other/rows"
