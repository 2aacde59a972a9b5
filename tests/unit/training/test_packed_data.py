"""Flags on packed rows against what the prepared data tell, and rows packed while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, text_info_path, to_json
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.rows import TrainingRows, open_rows
from tests.unit.data.made_tokenizers import make_tokenizer
from tests.unit.data.packed_files import write_packed

VOCABULARY = 100
LENGTHS = [6, 3, 9, 4, 5, 2, 7, 8]


def rows(data: Path, *words: object, tokenizer: Any = None, command: str = "posttrain") -> TrainingRows:
    sizes = ["--micro-batch-size", 1, "--global-batch-size", 4, "--lora-r", 4, "--train-iters", 5]
    job = parse(command, [str(word) for word in ["--data-path", data, *sizes, "--no-shuffle", *words]])
    return open_rows(job, 16, VOCABULARY, None if tokenizer is None else LazyTokenizer(lambda: tokenizer))


def write_info(path: Path, **values: Any) -> None:
    path.write_text(to_json(PreparedInfo(tokenizer_fingerprint="", handler_name="", **values)))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Row i is the token i + 1 again and again."""
    contents = [[number + 1] * length for number, length in enumerate(LENGTHS)]
    write_packed(tmp_path / "single", [(row, row) for row in contents], [[1] * len(row) for row in contents])
    return tmp_path / "single"


@pytest.fixture
def neat(tmp_path: Path) -> Path:
    contents = [([1] * 4 + [2] * 3 + [0], [-100, 1, 1, 1, -100, 2, 2, -100])] * 4
    write_packed(tmp_path / "neat", contents, [[1] * 4 + [2] * 3 + [0]] * 4)
    return tmp_path / "neat"


class TestInstructionRows:
    @pytest.mark.parametrize("flags", ["", "--neat-pack", "--neat-pack --reset-attention-mask", "--packing"])
    @pytest.mark.parametrize("told", [True, False])
    def test_neat_rows_tell_themselves(self, neat: Path, flags: str, told: bool) -> None:
        if told:
            write_info(info_path(neat), pack="neat")
        found = rows(neat, *flags.split())
        assert "packed neatly" in found.notices[0]
        batch = found.train_batches(0, 1, 1).step(1)[0]
        assert batch.sub_rows is not None and batch.sub_rows[0][:2] == (4, 3)
        assert batch.position_ids[0, :7].tolist() == [0, 1, 2, 3, 0, 1, 2]

    @pytest.mark.parametrize("flag", ["--neat-pack", "--reset-attention-mask", "--reset-position-ids"])
    @pytest.mark.parametrize("pack", ["plain", "unknown"])
    def test_flags_that_the_data_do_not_bear_out(self, single: Path, flag: str, pack: str) -> None:
        if pack != "unknown":
            write_info(info_path(single), pack=pack)
        with pytest.raises(
            Refused, match=f"^{flag}: nothing tells which rows .*prepare them with --neat-pack"
        ):
            rows(single, flag)
        assert rows(single, flag, "--packing").notices == ()

    def test_single_rows(self, single: Path) -> None:
        write_info(info_path(single))
        with pytest.raises(
            Refused, match="--neat-pack --reset-attention-mask: .*leave the flags out; --packing"
        ):
            rows(single, "--neat-pack", "--reset-attention-mask")
        assert rows(single, "--reset-attention-mask").notices == (
            f"no effect: --reset-attention-mask, since each row of {single} is a document of its own",
        )

    def test_plainly_packed_rows_run_through(self, single: Path) -> None:
        write_info(info_path(single), pack="plain")
        found = rows(single)
        assert found.notices == ()
        assert found.train_batches(0, 1, 1).step(1)[0].sub_rows is None


class TestPackingWhileTraining:
    def test_a_global_batch_in_as_few_rows_as_fit(self, single: Path) -> None:
        batches = rows(single, "--packing").train_batches(0, 1, 1).step(1)
        assert sorted(batch.sub_rows or () for batch in batches) == [((6, 4),), ((3, 9),)][::-1]
        assert sum(batch.num_tokens for batch in batches) == sum(LENGTHS[:4])

    def test_ranks_share_a_step(self, single: Path) -> None:
        found = rows(single, "--packing")
        ranks = [found.train_batches(rank, 2, 1).step(2) for rank in (0, 1)]
        samples = [sorted(set(batch.sample_ids[0].tolist())) for rank in ranks for batch in rank]
        assert sorted(sum(samples, [])) == [4, 5, 6, 7]

    def test_evaluation(self, single: Path) -> None:
        found = rows(single, "--packing", "--valid-data-path", single, "--eval-iters", -1)
        passes = found.eval_batches(0, 1, 1)
        assert passes is not None
        assert [sum(batch.num_tokens for batch in batches) for batches in passes] == [22, 22]
        assert all(batch.sub_rows is not None for batches in passes for batch in batches)


class TestPlainText:
    END = 9

    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        builder = IndexedDatasetBuilder(tmp_path / "text")
        for _ in range(12):
            builder.add_document([1, 2, 3, 4, self.END])
        builder.publish()
        return tmp_path / "text"

    @pytest.mark.parametrize("flag", ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"])
    def test_end_token_of_the_prepared_data(self, text: Path, flag: str) -> None:
        write_info(text_info_path(text), eos_token_id=self.END)
        batch = rows(text, flag, command="pretrain").train_batches(0, 1, None).step(1)[0]
        assert (batch.sub_rows is not None) == (flag == "--reset-attention-mask")
        restarting = batch.position_ids.dim() == 2 and batch.position_ids[0].tolist()[:6] == [
            0,
            1,
            2,
            3,
            4,
            0,
        ]
        assert restarting == (flag == "--reset-position-ids")
        assert batch.num_loss_tokens == (13 if flag == "--eod-mask-loss" else 16)

    def test_end_token_of_the_tokenizer(self, text: Path) -> None:
        tokenizer = make_tokenizer("gpt2")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.END)
        found = rows(text, "--reset-attention-mask", tokenizer=tokenizer, command="pretrain")
        assert found.train_batches(0, 1, None).step(1)[0].sub_rows == ((5, 5, 5, 1),)

    def test_no_end_token_is_refused(self, text: Path) -> None:
        with pytest.raises(
            Refused, match="--reset-attention-mask: it is not known which token ends a document"
        ):
            rows(text, "--reset-attention-mask", command="pretrain")

    def test_documents_without_end_are_refused(self, text: Path) -> None:
        write_info(text_info_path(text), eos_token_id=8)
        with pytest.raises(Refused, match="do not end with the end token 8; prepare them with --append-eod"):
            rows(text, "--reset-position-ids", command="pretrain")
