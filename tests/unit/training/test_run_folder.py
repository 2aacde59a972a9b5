"""From where a job starts, by what its folders hold and its flags say."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.run_folder import (
    Start,
    announce_replacement,
    clear_run,
    find_saved_run,
    find_start,
    make_save_folder,
    prune,
)

NOTHING = Start()


def make_run(save: Path, *iterations: int) -> Path:
    """A folder with a run's checkpoints; the last iteration is the latest."""
    for iteration in iterations:
        folder = save / f"iter_{iteration:07d}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        (folder / "run_state.json").write_text(json.dumps({"iteration": iteration}))
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iterations[-1]}")
    (save / "adapter").symlink_to(f"iter_{iterations[-1]:07d}/adapter")
    return save


def start(*words: object) -> Start:
    return find_start(parse("posttrain", ["--data-path", "rows", *map(str, words)]))


@pytest.fixture
def save(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", 5, 10)


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_nothing_to_start_from(tmp_path: Path) -> None:
    assert start("--lora-r", 4) == NOTHING
    assert start("--lora-r", 4, "--save", tmp_path / "new") == NOTHING
    assert start("--lora-r", 4, "--save", tmp_path) == NOTHING, "an empty folder"
    assert NOTHING.iteration == 0


def test_a_peft_folder_is_weights_only(peft: Path, tmp_path: Path) -> None:
    assert start("--lora-load", peft, "--save", tmp_path / "new") == NOTHING


def test_the_adapter_in_a_run_is_a_peft_folder(save: Path, tmp_path: Path) -> None:
    assert start("--lora-load", save / "adapter", "--save", tmp_path / "new") == NOTHING


def test_a_save_folder_is_gone_on_from_its_latest(save: Path, tmp_path: Path) -> None:
    found = start("--lora-load", save, "--save", tmp_path / "new")
    assert found.run is not None and found.run.folder == save / "iter_0000010"
    assert (found.iteration, found.continues, found.load_optimizer, found.load_random_state) == (
        10,
        True,
        True,
        True,
    )


def test_one_of_its_iterations(save: Path, tmp_path: Path) -> None:
    found = start("--lora-load", save / "iter_0000005", "--save", tmp_path / "new")
    assert found.run is not None and found.run.folder == save / "iter_0000005"
    assert found.iteration == 5 and found.load_optimizer


def test_finetune_takes_the_weights_and_starts_at_0(save: Path, tmp_path: Path) -> None:
    found = start("--lora-load", save, "--finetune", "--save", tmp_path / "new")
    assert found.run is not None and found.run.iteration == 10
    assert (found.iteration, found.continues, found.load_optimizer, found.load_random_state) == (
        0,
        False,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("flags", "optimizer", "random"),
    [
        (["--no-load-optim"], False, True),
        (["--no-load-rng"], True, False),
        (["--no-load-optim", "--no-load-rng"], False, False),
    ],
)
def test_parts_can_be_left_out(
    save: Path, tmp_path: Path, flags: list[str], optimizer: bool, random: bool
) -> None:
    found = start("--lora-load", save, "--save", tmp_path / "new", *flags)
    assert found.iteration == 10
    assert (found.load_optimizer, found.load_random_state) == (optimizer, random)


def test_without_lora_a_run_is_given_to_load(save: Path, tmp_path: Path) -> None:
    assert start("--load", save, "--save", tmp_path / "new").iteration == 10
    assert start("--load", save / "iter_0000005", "--save", tmp_path / "new").iteration == 5


def test_with_lora_load_is_the_base_model(save: Path, tmp_path: Path) -> None:
    assert start("--load", save, "--lora-r", 4, "--save", tmp_path / "new") == NOTHING


class TestResumeAuto:
    @pytest.mark.parametrize("flags", [[], ["--finetune"], ["--no-load-optim", "--no-load-rng"]], ids=str)
    def test_a_whole_checkpoint_is_resumed_in_full(self, save: Path, flags: list[str]) -> None:
        found = start("--lora-r", 4, "--save", save, "--resume", "auto", *flags)
        assert found.run is not None and found.run.folder == save / "iter_0000010"
        assert (found.iteration, found.load_optimizer, found.load_random_state) == (10, True, True)

    def test_it_wins_over_an_adapter(self, save: Path, peft: Path) -> None:
        assert start("--lora-load", peft, "--save", save, "--resume", "auto").iteration == 10

    def test_it_wins_over_another_run(self, save: Path, tmp_path: Path) -> None:
        other = make_run(tmp_path / "other", 3)
        assert start("--lora-load", other, "--save", save, "--resume", "auto").iteration == 10

    def test_nothing_there_is_a_fresh_start(self, tmp_path: Path) -> None:
        assert start("--lora-r", 4, "--save", tmp_path / "new", "--resume", "auto") == NOTHING
        (tmp_path / "metrics.jsonl").write_text("")
        assert start("--lora-r", 4, "--save", tmp_path, "--resume", "auto") == NOTHING

    def test_the_first_start_is_as_the_other_flags_say(self, save: Path, peft: Path, tmp_path: Path) -> None:
        new = tmp_path / "new"
        assert start("--lora-load", peft, "--save", new, "--resume", "auto") == NOTHING
        found = start("--lora-load", save, "--finetune", "--save", new, "--resume", "auto")
        assert found.run is not None and found.iteration == 0


class TestASaveFolderThatHoldsARun:
    def check_refused(self, save: Path, *words: object) -> None:
        with pytest.raises(Refused) as caught:
            start("--save", save, *words)
        text = str(caught.value)
        assert str(save) in text and "iteration 10" in text
        assert "--resume auto" in text and "--overwrite" in text

    def test_is_refused(self, save: Path, peft: Path, tmp_path: Path) -> None:
        self.check_refused(save, "--lora-r", 4)
        self.check_refused(save, "--lora-load", peft)
        self.check_refused(save, "--lora-load", make_run(tmp_path / "other", 3))
        self.check_refused(save, "--load", save, "--lora-r", 4)

    def test_is_refused_where_only_its_weights_are_taken(self, save: Path) -> None:
        self.check_refused(save, "--lora-load", save, "--finetune")
        self.check_refused(save, "--lora-load", save / "adapter")

    def test_is_gone_on_with(self, save: Path, tmp_path: Path) -> None:
        assert start("--lora-load", save, "--save", save).iteration == 10
        assert start("--lora-load", save / "iter_0000005", "--save", save).iteration == 5
        (tmp_path / "link").symlink_to(save)
        assert start("--lora-load", tmp_path / "link", "--save", save).iteration == 10
        assert start("--lora-load", save, "--save", tmp_path / "link").iteration == 10

    def test_is_gone_on_with_from_its_best(self, save: Path) -> None:
        (save / "best").mkdir()
        (save / "best" / "run_state.json").write_text('{"iteration": 7}')
        assert start("--lora-load", save / "best", "--save", save).iteration == 7

    def test_is_replaced_on_demand(self, save: Path, tmp_path: Path) -> None:
        assert start("--lora-r", 4, "--save", save, "--overwrite") == NOTHING
        other = make_run(tmp_path / "other", 3)
        found = start("--lora-load", other, "--save", save, "--overwrite")
        assert found.iteration == 3
        assert not found.goes_on_in(save) and found.goes_on_in(other)


@pytest.mark.parametrize("words", [[], ["--resume", "auto"], ["--overwrite"]], ids=str)
def test_a_checkpoint_that_is_no_run_is_never_overwritten(tmp_path: Path, words: list[str]) -> None:
    """A converted base model: people give the same folder to --load and --save."""
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(Refused, match="no training run of this program.*choose another folder"):
        start("--load", tmp_path, "--lora-r", 4, "--save", tmp_path, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"iteration": "many"}', '{"iteration": null}'])
def test_a_damaged_state_is_one_sentence(save: Path, text: str) -> None:
    (save / "iter_0000010" / "run_state.json").write_text(text)
    with pytest.raises(Refused, match="iter_0000010/run_state.json: not the state of a run"):
        start("--lora-r", 4, "--save", save, "--resume", "auto")


def test_a_latest_file_that_points_nowhere_is_one_sentence(save: Path) -> None:
    (save / "latest_checkpointed_iteration.txt").write_text("99")
    with pytest.raises(Refused, match="iter_0000099 is not there"):
        start("--lora-r", 4, "--save", save, "--resume", "auto")


def test_a_checkpoint_without_the_latest_file_is_not_announced(save: Path) -> None:
    """A kill between the folder and the latest file of the first checkpoint: a fresh start."""
    (save / "latest_checkpointed_iteration.txt").unlink()
    assert find_saved_run(save) is None
    assert start("--lora-r", 4, "--save", save, "--resume", "auto") == NOTHING


def test_clearing_removes_the_run_and_nothing_else(save: Path) -> None:
    (save / "best").mkdir()
    (save / "metrics.jsonl").write_text("")
    (save / "notes.txt").write_text("mine")
    clear_run(save)
    assert [path.name for path in save.iterdir()] == ["notes.txt"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run", 5, 9, 10, 100)
    (save / "best").mkdir()
    (save / "iter_0000001").mkdir()
    prune(save / "iter_0000100", keep=2)
    assert sorted(path.name for path in save.glob("iter_*")) == [
        "iter_0000001",
        "iter_0000010",
        "iter_0000100",
    ]
    assert (save / "best").is_dir()
    prune(save / "iter_0000100", keep=5)
    assert (save / "iter_0000010").is_dir()


def test_pruning_never_removes_what_was_just_written(tmp_path: Path) -> None:
    """The run was taken up again from iteration 5, and 20 is left of the first try."""
    save = make_run(tmp_path / "run", 5, 20, 6)
    prune(save / "iter_0000006", keep=1)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000006", "iter_0000020"]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, whom permissions do not stop."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_save_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with as_nobody():
            for save in (folder, folder / "new"):
                with pytest.raises(Refused) as refusal:
                    make_save_folder(save)
                assert str(refusal.value) == (
                    f"--save {save}: cannot be written to (Permission denied); choose another folder"
                )
        assert not list(folder.iterdir())


def test_a_restart_before_the_replacement_replaces(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt may die while it loads: the run in the folder is then still another one."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    announce_replacement(save)
    assert start("--lora-r", 4, "--save", save, "--overwrite") == NOTHING
    clear_run(save)
    make_run(save, 3)
    assert start("--lora-r", 4, "--save", save, "--overwrite").iteration == 3
