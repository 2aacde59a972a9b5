"""What is decided, and refused, before processes join."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.errors import Refused
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.tiny import Tiny, plan

TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_a_plan_holds_what_was_resolved(tiny: Tiny, tmp_path: Path) -> None:
    found = plan(
        tiny.words(train_iters=7, save=tmp_path / "run", lora_target_modules=("linear_qkv", "linear_fc2"))
    )
    assert found.num_steps == 7
    assert (found.shape.num_layers, found.shape.vocab_size, found.seq_length) == (4, VOCAB_SIZE, 48)
    assert found.adapter is not None
    assert found.adapter.spec.describe() == "r 4, alpha 8, on linear_qkv linear_fc2"
    assert found.adapter.source is None and found.start.iteration == 0
    assert found.base_model_name == str(tiny.model)
    assert len(found.rows.train) == 12 and found.rows.valid is None
    assert found.learning_rate.at(0) == 1e-2


def test_all_parameters_without_a_lora_flag(tiny: Tiny) -> None:
    assert plan(tiny.words(lora_r=None)).adapter is None


def test_a_new_adapter_that_the_installed_peft_does_not_load_is_told(tiny: Tiny, tmp_path: Path) -> None:
    """transformers 5 has gate and up of all experts in one parameter; w1 is gate alone."""
    mixtral = Tiny(make_model("mixtral", tmp_path), tiny.data)
    notices = plan(mixtral.words(lora_target_modules="w1")).notices
    assert any("saved with its experts per-expert" in notice for notice in notices)


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"train_iters": 7}, 7), ({"train_samples": 9}, 5), ({"epochs": 1}, 6), ({"epochs": 2.6}, 16), ({}, 18)],
    ids=str,
)
def test_length_of_the_run(tiny: Tiny, length: dict[str, float], steps: int) -> None:
    """12 rows in global batches of 2; three epochs where nothing is said."""
    assert plan(tiny.words(**{"train_iters": None, **length})).num_steps == steps


def test_the_base_model_s_name_can_be_given(tiny: Tiny) -> None:
    assert plan(tiny.words(base_model_name="me/model")).base_model_name == "me/model"


class TestSequenceLength:
    def test_left_out_it_is_the_model_s_with_a_notice(self, tiny: Tiny) -> None:
        found = plan(tiny.words(seq_length=None))
        assert found.seq_length == 128
        assert "default taken: --seq-length 128" in found.notices

    def test_left_out_it_is_never_more_than_4096(self, tiny: Tiny) -> None:
        found = plan(tiny.words(seq_length=None, max_position_embeddings=8192))
        assert found.seq_length == 4096

    def test_more_than_the_model_has_is_refused(self, tiny: Tiny) -> None:
        with pytest.raises(Refused, match="--seq-length 129 .* 128 positions.*--max-position-embeddings"):
            plan(tiny.words(seq_length=129))

    def test_unless_the_model_is_said_to_have_them(self, tiny: Tiny) -> None:
        assert plan(tiny.words(seq_length=129, max_position_embeddings=256)).seq_length == 129


@pytest.mark.usefixtures("two_ranks")
class TestPadding:
    def test_to_the_sequence_length(self, tiny: Tiny) -> None:
        assert plan(tiny.words()).pad_to is None
        assert plan(tiny.words(**TP2, sequence_parallel=True)).pad_to is None

    @pytest.mark.parametrize(
        ("flags", "multiple"),
        [
            ({}, 8),
            ({"pad_to_multiple_of": 1}, 1),
            ({"pad_to_multiple_of": 3}, 3),
            (TP2, 8),
            ({**TP2, "sequence_parallel": True}, 8),
            ({**TP2, "sequence_parallel": True, "pad_to_multiple_of": 3}, 12),
            ({**TP2, "sequence_parallel": True, "pad_to_multiple_of": 1}, 4),
            ({"sequence_parallel": True, "pad_to_multiple_of": 1}, 1),
            ({**CP2, "pad_to_multiple_of": 1}, 4),
            ({**CP2, "pad_to_multiple_of": 3}, 12),
        ],
        ids=str,
    )
    def test_to_the_longest_of_the_micro_batch(
        self, tiny: Tiny, flags: dict[str, object], multiple: int
    ) -> None:
        assert plan(tiny.words(variable_seq_lengths=True, **flags)).pad_to == multiple

    def test_a_length_that_ranks_cannot_share_is_refused(self, tiny: Tiny) -> None:
        with pytest.raises(Refused, match="--seq-length 41 .* 2, .*nearest one is 42"):
            plan(tiny.words(seq_length=41, **TP2, sequence_parallel=True))
        assert plan(tiny.words(seq_length=41, **TP2)).seq_length == 41
        with pytest.raises(Refused, match="--seq-length 42 .* 4, for two equal chunks .*nearest one is 44"):
            plan(tiny.words(seq_length=42, **CP2))
        assert plan(tiny.words(seq_length=44, **CP2)).pad_to is None

    def test_no_row_is_longer_than_the_sequence_length_after_padding(self, tiny: Tiny) -> None:
        found = plan(tiny.words(variable_seq_lengths=True, seq_length=30))
        for step in range(1, 7):
            for batch in found.rows.train_batches(0, 1, found.pad_to).step(step):
                assert batch.tokens.size(1) % 8 == 0 and batch.tokens.size(1) <= 32


class TestModel:
    def test_without_load_weights_are_random_with_a_notice(self, tiny: Tiny) -> None:
        shape = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB_SIZE,
        }
        found = plan(tiny.words(load=None, **shape))
        assert isinstance(found.source, RandomSource) and found.source.std == 0.02
        assert any("random weights" in notice for notice in found.notices)
        assert found.base_model_name is None

    def test_a_contradicting_flag_names_both(self, tiny: Tiny) -> None:
        with pytest.raises(Refused, match=r"--num-layers 3 \(checkpoint: 4\)"):
            plan(tiny.words(num_layers=3))

    @pytest.mark.usefixtures("two_ranks")
    def test_a_layout_that_does_not_divide(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(Refused, match="--pipeline-model-parallel-size 3 .* 4 layers"):
            plan(tiny.words(pipeline_model_parallel_size=3))
        monkeypatch.setenv("WORLD_SIZE", "8")
        with pytest.raises(Refused, match="--tensor-model-parallel-size 8 .* 4 query groups"):
            plan(tiny.words(tensor_model_parallel_size=8))

    def test_stages_and_no_ops(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        flags = {"pipeline_model_parallel_size": 2, "noop_layers": "0,5", "num_layers": 6}
        found = plan(tiny.words(**flags, num_layer_list="2,4"))
        assert found.shape.num_layers == 4
        assert found.placement.describe() == "0 + 1 no-op, 1-3 + 1 no-op"
        with pytest.raises(Refused, match=r"--num-layers 4 \(checkpoint: 6\)"):
            plan(tiny.words(**{**flags, "num_layers": 4}))

    def test_interleaving_needs_whole_rounds(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        flags = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
        assert plan(tiny.words(**flags, global_batch_size=8)).placement.vp_size == 2
        with pytest.raises(Refused, match="--global-batch-size 6 gives 3 micro-batches .* valid one is 8"):
            plan(tiny.words(**flags, global_batch_size=6))

    def test_an_unknown_target_names_the_available_ones(self, tiny: Tiny) -> None:
        with pytest.raises(
            Refused, match="no module linear_kqv.*linear_fc1, linear_fc2, linear_proj, linear_qkv"
        ):
            plan(tiny.words(lora_target_modules=("linear_kqv",)))

    def test_chunks_of_recomputation(self, tiny: Tiny) -> None:
        with pytest.raises(Refused, match="--recompute-num-layers 3 .* 4 layers"):
            plan(tiny.words(recompute_granularity="full", recompute_num_layers=3))

    def test_a_warm_up_longer_than_the_epochs(self, tiny: Tiny) -> None:
        with pytest.raises(Refused, match="--lr-warmup-iters 6 .* 6 steps"):
            plan(tiny.words(train_iters=None, epochs=1, lr_warmup_iters=6))


class TestSaveFolder:
    def test_is_made(self, tiny: Tiny, tmp_path: Path) -> None:
        plan(tiny.words(save=tmp_path / "a" / "b"))
        assert (tmp_path / "a" / "b").is_dir()

    def test_a_refused_job_makes_none(self, tiny: Tiny, tmp_path: Path) -> None:
        for flags in (
            {"seq_length": 500},
            {"lora_target_modules": ("x",)},
            {"epochs": 1, "train_iters": None, "lr_warmup_iters": 6},
        ):
            with pytest.raises(Refused):
                plan(tiny.words(save=tmp_path / "run", **flags))
        assert not (tmp_path / "run").exists()

    def test_a_file_in_its_place(self, tiny: Tiny, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(Refused, match="--save .*run: cannot be written to"):
            plan(tiny.words(save=tmp_path / "run"))
        with pytest.raises(Refused, match="--save .*run/deeper: cannot be written to"):
            plan(tiny.words(save=tmp_path / "run" / "deeper"))
