"""The rows of a run: which are trained on, which evaluated, in what order, and with what around them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, to_json
from mindspeed_lora.data.tokenizer import LazyTokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.training.rows import TrainingRows, open_rows
from tests.support.rows import Row, write_rows
from tests.unit.data.made_tokenizers import make_tokenizer

VOCABULARY = 500


def numbered(count: int, length: int = 6, first: int = 100) -> list[Row]:
    """Row i is ``first + i`` again and again, so that batches tell their documents."""
    return [Row([first + i] * length, [-100, *[first + i] * (length - 1)]) for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows", numbered(10))


def rows(
    data: Path, *words: object, tokenizer: Any = None, seq_length: int = 16, command: str = "posttrain"
) -> TrainingRows:
    sizes = ["--micro-batch-size", 1, "--global-batch-size", 4, "--lora-r", 4, "--train-iters", 5]
    job = parse(command, [str(word) for word in ["--data-path", data, *sizes, *words]])
    return open_rows(job, seq_length, VOCABULARY, lazily(tokenizer))


def lazily(tokenizer: Any) -> LazyTokenizer | None:
    return None if tokenizer is None else LazyTokenizer(lambda: tokenizer)


def documents(batches: list[Batch]) -> list[int]:
    """The documents of numbered rows, in order."""
    return [int(row[0]) - 100 for batch in batches for row in batch.tokens]


class TestTraining:
    def test_without_shuffling_rows_follow_the_file(self, data: Path) -> None:
        batches = rows(data, "--no-shuffle").train_batches(0, 1, None)
        assert [documents(batches.step(k)) for k in (1, 2, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]

    @pytest.mark.parametrize("flags", [["--no-shuffle"], ["--seed", 5]], ids=str)
    @pytest.mark.parametrize(("micro", "dp"), [(1, 4), (2, 2), (4, 1), (1, 2)])
    def test_a_step_has_the_same_rows_in_every_layout(
        self, data: Path, flags: list[object], micro: int, dp: int
    ) -> None:
        expected = rows(data, *flags).train_batches(0, 1, None)
        found = rows(data, *flags, "--micro-batch-size", micro)
        for step in (1, 2, 3, 7):
            ranks = [documents(found.train_batches(rank, dp, None).step(step)) for rank in range(dp)]
            assert sorted(sum(ranks, [])) == sorted(documents(expected.step(step)))

    def test_shuffling_depends_on_the_seed(self, data: Path) -> None:
        orders = {
            tuple(documents(rows(data, "--seed", seed).train_batches(0, 1, None).step(1)))
            for seed in (1, 2, 3)
        }
        assert len(orders) == 3

    def test_an_epoch_has_each_row_once(self, data: Path) -> None:
        batches = rows(data, "--global-batch-size", 5).train_batches(0, 1, None)
        assert sorted(documents(batches.step(1) + batches.step(2))) == list(range(10))

    def test_rows_are_filled_up_to_the_sequence_length(self, data: Path) -> None:
        batch = rows(data).train_batches(0, 1, None).step(1)[0]
        assert batch.tokens.shape == (1, 16) and batch.num_tokens == 6 and batch.num_loss_tokens == 5

    def test_or_to_a_multiple(self, data: Path) -> None:
        assert rows(data).train_batches(0, 1, 4).step(1)[0].tokens.shape == (1, 8)
        assert rows(data).train_batches(0, 1, 1).step(1)[0].tokens.shape == (1, 6)

    def test_overlong_rows_are_told(self, data: Path) -> None:
        found = rows(data, seq_length=5)
        assert found.notices == ("rows longer than --seq-length 5: 10 cut, 0 dropped (--overlong truncate)",)
        assert found.train_batches(0, 1, None).step(1)[0].tokens.shape == (1, 5)
        assert rows(data).notices == ()

    def test_a_token_outside_of_the_vocabulary_is_one_sentence(self, tmp_path: Path) -> None:
        data = write_rows(tmp_path / "other", numbered(4, first=VOCABULARY - 2))
        batches = rows(data, "--no-shuffle").train_batches(0, 1, None)
        with pytest.raises(Failed, match="sample 2 holds the token id 500.*500 tokens"):
            batches.step(1)

    def test_no_row_left_is_refused(self, data: Path) -> None:
        with pytest.raises(Refused, match="no row is left"):
            rows(data, "--overlong", "drop", seq_length=5)
        with pytest.raises(Refused, match="no row is left"):
            rows(data, "--split", "1,99,0")

    def test_no_data_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="--data-path .*nowhere"):
            rows(tmp_path / "nowhere")

    def test_plain_text(self, tmp_path: Path, data: Path) -> None:
        found = rows(Path(f"{data}_packed_input_ids_document"), "--no-shuffle", command="pretrain")
        assert len(found.train) == 59 // 16
        batch = found.train_batches(0, 1, None).step(1)[0]
        assert torch.equal(batch.tokens[0, 1:], batch.labels[0, :-1]), "each token predicts the next"
        assert batch.num_loss_tokens == 16


class TestEvaluation:
    def passes(self, found: TrainingRows, dp_rank: int = 0, dp: int = 1) -> list[list[int]]:
        evaluation = found.eval_batches(dp_rank, dp, 2)
        assert evaluation is not None
        return [
            [int(row[0]) for batch in batches for row in batch.sample_ids if int(row[0]) >= 0]
            for batches in evaluation
        ]

    def test_parts_follow_each_other_in_the_file(self, data: Path) -> None:
        found = rows(data, "--split", "60,30,10", "--eval-iters", -1)
        assert len(found.train) == 6 and found.valid is not None and len(found.valid) == 3
        assert found.valid[0].input_ids[0] == 106

    @pytest.mark.parametrize(
        "words", [["--split", "60,40,0"], ["--eval-iters", 0, "--split", "60,40,0"]], ids=str
    )
    def test_no_evaluation_unless_asked_for(self, data: Path, words: list[object]) -> None:
        found = rows(data, *words)
        assert found.valid is None and found.eval_batches(0, 1, None) is None
        assert len(found.train) == 6

    def test_no_validation_part_is_no_evaluation(self, data: Path) -> None:
        """Published scripts give --eval-iters 10 with --split 100,0,0; a notice tells."""
        assert rows(data, "--eval-iters", 10).valid is None

    def test_a_share_of_no_row_is_refused(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"--eval-iters 1: --split 99,1,0 of .* no row for validation"):
            rows(data, "--eval-iters", 1, "--split", "99,1,0")
        long = write_rows(tmp_path / "long", numbered(3, length=20))
        with pytest.raises(Refused, match=r"--valid-data-path .*long leaves no row"):
            rows(data, "--eval-iters", 1, "--valid-data-path", long, "--overlong", "drop")

    def test_other_data(self, data: Path, tmp_path: Path) -> None:
        other = write_rows(tmp_path / "other", numbered(5, first=300))
        found = rows(data, "--eval-iters", -1, "--valid-data-path", other)
        assert len(found.train) == 10 and found.valid is not None and len(found.valid) == 5
        assert found.valid[0].input_ids[0] == 300

    def test_all_rows_once_in_file_order(self, data: Path) -> None:
        found = rows(data, "--eval-iters", -1, "--split", "30,70,0")
        for _ in range(2):
            assert self.passes(found) == [[0, 1, 2, 3], [4, 5, 6]], "can be gone through again"

    def test_so_many_global_batches(self, data: Path) -> None:
        found = rows(data, "--eval-iters", 1, "--split", "30,70,0")
        assert self.passes(found) == [[0, 1, 2, 3]]
        assert self.passes(rows(data, "--eval-iters", 9, "--split", "30,70,0")) == [[0, 1, 2, 3], [4, 5, 6]]

    def test_ranks_share_the_rows_in_as_many_micro_batches(self, data: Path) -> None:
        found = rows(data, "--eval-iters", -1, "--split", "30,70,0")
        first, second = self.passes(found, 0, 2), self.passes(found, 1, 2)
        assert first == [[0, 2], [4, 6]] and second == [[1, 3], [5]]
        lengths = [[len(batches) for batches in found.eval_batches(rank, 2, None) or ()] for rank in (0, 1)]
        assert lengths[0] == lengths[1], "else a rank would wait for its peer"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("gpt2")


class TestTokenizer:
    def prepare(self, data: Path, tokenizer: Any, **changes: Any) -> None:
        info = PreparedInfo(
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            handler_name="AlpacaStyleInstructionHandler",
            prompt_type="chatml",
            chat_template="{{ messages[0].content }}",
            pad_token_id=7,
        )
        info_path(data).write_text(to_json(dataclasses.replace(info, **changes)))

    def test_another_tokenizer_is_refused(self, data: Path, tokenizer: Any) -> None:
        self.prepare(data, make_tokenizer("llama3"))
        with pytest.raises(Refused, match="prepared with another tokenizer"):
            rows(data, tokenizer=tokenizer)

    def test_another_tokenizer_of_the_validation_rows_too(
        self, data: Path, tokenizer: Any, tmp_path: Path
    ) -> None:
        self.prepare(data, tokenizer)
        other = write_rows(tmp_path / "other", numbered(5))
        self.prepare(other, make_tokenizer("llama3"))
        with pytest.raises(Refused, match="other.*prepared with another tokenizer"):
            rows(data, "--valid-data-path", other, "--eval-iters", 1, tokenizer=tokenizer)

    def test_the_same_files_are_the_same_tokenizer(self, data: Path) -> None:
        """Nothing of transformers is loaded then."""
        write_info = info_path(data).write_text
        write_info(
            to_json(
                PreparedInfo(tokenizer_fingerprint="", tokenizer_files="d", handler_name="", pad_token_id=7)
            )
        )

        def load() -> Any:
            raise AssertionError("loaded")

        job = parse("posttrain", ["--data-path", str(data), "--lora-r", "4"])
        assert open_rows(job, 16, VOCABULARY, LazyTokenizer(load, "d")).pad_token_id == 7
        for digest in ("e", None):
            with pytest.raises(AssertionError, match="loaded"):
                open_rows(job, 16, VOCABULARY, LazyTokenizer(load, digest))

    def test_padding_is_the_prepared_data_s(self, data: Path, tokenizer: Any) -> None:
        self.prepare(data, tokenizer)
        found = rows(data, tokenizer=tokenizer)
        assert found.pad_token_id == 7
        assert set(found.train_batches(0, 1, None).step(1)[0].tokens[0, 6:].tolist()) == {7}

    @pytest.mark.parametrize(("pad", "expected"), [(VOCABULARY, "eos"), (-1, "eos"), (None, "eos"), (0, 0)])
    def test_padding_is_in_the_vocabulary(
        self, data: Path, tokenizer: Any, pad: int | None, expected: int | str
    ) -> None:
        self.prepare(data, tokenizer, pad_token_id=pad)
        wanted = tokenizer.eos_token_id if expected == "eos" else expected
        assert rows(data, tokenizer=tokenizer).pad_token_id == wanted

    def test_without_any_of_them_it_is_0(self, data: Path) -> None:
        assert rows(data).pad_token_id == 0

    def test_the_template_that_was_trained_is_saved(self, data: Path, tokenizer: Any, tmp_path: Path) -> None:
        self.prepare(data, tokenizer)
        tokenizer.chat_template = "the model's own"
        found = rows(data, tokenizer=tokenizer)
        assert self.saved(found, tokenizer, tmp_path / "trained", False) == "{{ messages[0].content }}"
        assert self.saved(found, tokenizer, tmp_path / "kept", True) == "the model's own"
        assert tokenizer.chat_template == "the model's own", "the tokenizer itself stays as it was"

    def test_rows_that_tell_no_template_keep_the_model_s(
        self, data: Path, tokenizer: Any, tmp_path: Path
    ) -> None:
        tokenizer.chat_template = "the model's own"
        found = rows(data, tokenizer=tokenizer)
        assert self.saved(found, tokenizer, tmp_path / "saved", False) == "the model's own"

    def test_without_a_tokenizer_nothing_is_written(self, data: Path, tmp_path: Path) -> None:
        rows(data).tokenizer_writer(None, False)(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def saved(self, found: TrainingRows, tokenizer: Any, folder: Path, keep: bool) -> str:
        from transformers import AutoTokenizer

        folder.mkdir()
        found.tokenizer_writer(lazily(tokenizer), keep)(folder)
        assert json.loads((folder / "tokenizer.json").read_text())
        template: str = AutoTokenizer.from_pretrained(folder).chat_template
        return template

    def test_another_prompt_type_is_refused(self, data: Path, tokenizer: Any) -> None:
        self.prepare(data, tokenizer)
        with pytest.raises(Refused, match="--prompt-type llama2 contradicts.*chatml"):
            rows(data, "--prompt-type", "llama2", tokenizer=tokenizer)
        assert rows(data, "--prompt-type", "chatml", tokenizer=tokenizer).chat_template is not None

    def test_the_prompt_type_tells_the_template_of_foreign_rows(self, data: Path, tokenizer: Any) -> None:
        found = rows(data, "--prompt-type", "chatml", tokenizer=tokenizer)
        assert found.chat_template is not None and "<|im_start|>" in found.chat_template
