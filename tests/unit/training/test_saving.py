"""What ranks send each other for a saved adapter."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.training import saving
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import random_rows, write_rows
from tests.support.tiny import Tiny, join, open_session


def test_an_expert_is_sent_without_the_buffer_that_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(
        make_model("mixtral", tmp_path / "model"), write_rows(tmp_path / "rows", random_rows(4, VOCAB_SIZE))
    )
    sent: list[int] = []

    def note(value: Any, groups: Any) -> list[Any]:
        sent.append(len(pickle.dumps(value)))
        return [value]

    monkeypatch.setattr(saving, "gather_objects", note)
    groups = join()
    try:
        words = tiny.words(save=tmp_path / "save", lora_r=16, use_distributed_optimizer=True)
        session = open_session(words, groups)
        trained = session._writer()._gather_trained()
    finally:
        destroy_groups()
    (size,) = sent
    numbers = sum(tensor.numel() for tensor in trained.values())
    # Four bytes a number, and what tells each piece's place.
    assert size < 4 * numbers + 1000 * len(trained)


def test_a_full_disk_is_told_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(Failed) as told, saving._told(tmp_path, 7):
        saving._write_random_states(Path("/dev/full"))
    assert str(told.value) == (
        "iteration 7 could not be saved: no space left on the disk: /dev/full; what was saved before is whole, "
        f"make room in {tmp_path} and go on with --resume auto"
    )


def test_a_full_disk_that_a_library_tells_as_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    told = "7 could not be saved: no space left on the disk; .* make room in"
    with pytest.raises(Failed, match=told), saving._told(tmp_path, 7):
        Tokenizer(BPE()).save("/dev/full")
