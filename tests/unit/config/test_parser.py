from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_lora.config.commands import grammar
from mindspeed_lora.config.features import NOT_BUILT
from mindspeed_lora.config.parser import Parsed, parse_words
from mindspeed_lora.errors import Refused

PUBLISHED = (Path(__file__).parent / "published_flags.txt").read_text().splitlines()


def parse(line: str, command: str = "posttrain") -> Parsed:
    return parse_words(line.split(), grammar(command))


def test_values_have_the_types_of_their_fields() -> None:
    parsed = parse("--lora-r 16 --lr 5e-5 --bf16 --lora-target-modules linear_qkv linear_proj --load=a=b")
    assert parsed.values == {
        "lora_r": 16,
        "lr": 5e-5,
        "bf16": True,
        "lora_target_modules": ("linear_qkv", "linear_proj"),
        "load": "a=b",
    }


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert parse("--lora-r 8 --log-throughput --lora-r 16 --log-throughput").values["lora_r"] == 16


def test_other_names_of_a_flag_mean_the_same() -> None:
    assert parse("--no-pad-to-seq-lengths").values == parse("--variable-seq-lengths").values


def test_negative_and_dashed_values() -> None:
    assert parse("--eval-iters -1 --save -run").values == {"eval_iters": -1, "save": "-run"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora-rank 3", "did you mean --q-lora-rank or --kv-lora-rank or --lora-r?"),
        ("--lora_alpha 3", "unknown flag --lora_alpha; did you mean --lora-alpha"),
        ("--num-expert 3", "did you mean --num-experts"),
        ("--zzzzzzzz", "unknown flag --zzzzzzzz; --help lists"),
        ("--lora", "unknown flag --lora;"),
        ("--lora-r", "--lora-r needs a value"),
        ("--lora-r --bf16", "--lora-r needs a value"),
        ("--resume --bf16", "--resume needs a value: auto"),
        ("--lora-target-modules --bf16", "--lora-target-modules needs a value"),
        ("--lora-r x", "--lora-r x: expected an integer"),
        ("--lr 1e-4x", "--lr 1e-4x: expected a number"),
        ("--clip-grad inf", "--clip-grad inf: expected a finite number"),
        ("--weight-decay nan", "--weight-decay nan: expected a finite number"),
        ("--lora-r 0", "--lora-r 0: expected an integer of at least 1"),
        (
            "--lora-rank-pattern q_proj",
            "--lora-rank-pattern q_proj: expected a JSON object of names and integers",
        ),
        ("--lora-rank-pattern [1]", "expected a JSON object of names and integers"),
        ('--lora-rank-pattern {"q":2.5}', "expected a JSON object of names and integers"),
        ('--lora-rank-pattern {"q":true}', "expected a JSON object of names and integers"),
        ('--lora-rank-pattern {"q":0}', "--lora-rank-pattern 0: expected an integer of at least 1"),
        ('--lora-rank-pattern {"q":1,"q":2}', "a name is there twice"),
        ('--lora-alpha-pattern {"q":NaN}', "expected a JSON object of names and numbers"),
        ('--lora-alpha-pattern {"q":-1}', "--lora-alpha-pattern -1: expected a number above 0"),
        ("--lora-layers-to-transform 1 -1", "--lora-layers-to-transform -1: expected a number of at least 0"),
        ("--lora-bias some", "--lora-bias some: expected one of none, all, lora_only"),
        ("--bf16=yes", "--bf16 is a switch and takes no value, but got 'yes'"),
        ("--bf16 yes", "unexpected word 'yes' after --bf16"),
        ("train", "unexpected word 'train'"),
        ("--lr-decay-style WSD", "expected one of cosine, linear, constant"),
        ("--split 0,1,2", "--split 0,1,2: expected one to three numbers"),
        ("--split a", "--split a: expected"),
    ],
)
def test_what_cannot_be_read_is_refused(line: str, message: str) -> None:
    with pytest.raises(Refused) as error:
        parse(line)
    assert message in str(error.value)


def test_flags_without_effect_are_listed_once_each() -> None:
    parsed = parse(
        "--use-flash-attn --shape-order BNSD --use-flash-attn --spec a.b layer_spec --local-rank=0"
    )
    assert parsed.values == {}
    assert parsed.without_effect == ["--use-flash-attn", "--shape-order", "--spec", "--local-rank"]


def test_training_flags_have_no_effect_in_inference() -> None:
    parsed = parse("--lr 1 --global-batch-size 4 --num-layers 2 --fp16", "inference")
    assert parsed.values == {"num_layers": 2, "fp16": True}
    assert parsed.without_effect == ["--lr", "--global-batch-size"]


def test_features_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="--use-dora: only plain LoRA"):
        parse("--use-dora")
    with pytest.raises(Refused, match="--mtp-num-layers 1: multi-token prediction"):
        parse("--mtp-num-layers 0 --mtp-num-layers 1")


def test_stages_are_flags_of_training_and_of_conversion() -> None:
    line = "--num-layer-list 3,1 --noop-layers 4"
    for command in ("posttrain", "convert"):
        assert parse(line, command).values == {"num_layer_list": "3,1", "noop_layers": "4"}
    with pytest.raises(Refused, match="--schedules-method dualpipev: the only schedules are 1F1B"):
        parse("--schedules-method dualpipev")


def test_values_that_leave_a_feature_off_are_fine() -> None:
    parsed = parse("--mtp-num-layers 0 --ckpt-format torch")
    assert parsed == Parsed()


def test_unquoted_placeholders_of_published_scripts_are_one_value() -> None:
    assert parse("--load your model ckpt path --bf16").values == {
        "load": "your model ckpt path",
        "bf16": True,
    }


def test_placeholders_of_published_evaluations_are_one_value() -> None:
    line = "--task your task name --task-data-path Your data path --load Your ckpt path"
    assert parse(line, "evaluation").values == {
        "task": ("your task name",),
        "task_data_path": ("Your data path",),
        "load": "Your ckpt path",
    }


def test_a_switch_may_have_the_word_that_says_whether_it_is_on() -> None:
    assert parse("--bf16 True --log-throughput false --lora-r 8").values == {
        "bf16": True,
        "log_throughput": False,
        "lora_r": 8,
    }
    assert parse("--bf16 --bf16=False").values == {"bf16": False}
    assert parse("--use-flash-attn True --use-dora False").without_effect == ["--use-flash-attn"]
    with pytest.raises(Refused, match="--use-dora"):
        parse("--use-dora True")


def test_what_is_left_of_a_line_continuation_is_no_word() -> None:
    assert parse_words(["--lora-r", "8", "\\", "--bf16"], grammar("posttrain")).values == {
        "lora_r": 8,
        "bf16": True,
    }


def test_line_ends_of_windows_are_named() -> None:
    for words in (["--lora-r", "8\r"], ["--bf16", "\r"]):
        with pytest.raises(Refused, match="Windows' line ends"):
            parse_words(words, grammar("posttrain"))


def test_all_unknown_flags_are_told_at_once() -> None:
    with pytest.raises(Refused) as error:
        parse("--lora-rr 8 --zzzzzzzz a b --bf16 --num-expert 3")
    assert "--zzzzzzzz (nothing like it), --num-expert (--num-experts)" in str(error.value)


def test_older_words_for_the_same() -> None:
    line = "--inference-prompt-type alpaca --sliding-window 8 --n-group 2"
    assert parse(line, "inference").values == {
        "prompt_type": "alpaca",
        "sliding_window_size": 8,
        "moe_router_num_groups": 2,
    }
    assert parse("--save-model-type save_huggingface_llama", "convert").values == {"save_model_type": "hf"}


def test_flags_of_megatron_lm() -> None:
    """With a meaning, without one here, and refused by what they ask for."""
    line = "--optimizer adam --use-checkpoint-args --async-save --profile --profile-step-start 2 --profile-ranks 0 1"
    assert parse(line).without_effect == [
        *("--use-checkpoint-args", "--async-save", "--profile", "--profile-step-start", "--profile-ranks")
    ]
    for refused, reason in (
        ("--optimizer sgd", "the optimizer is AdamW"),
        ("--fp8-format hybrid", "fp8"),
        ("--rampup-batch-size 16 16 100", "one batch size"),
        ("--ckpt-step 100", "its own folder in --load"),
        ("--use-torch-fsdp2", "--use-distributed-optimizer"),
    ):
        with pytest.raises(Refused, match=f"{refused}: .*{reason}"):
            parse(refused)


def test_what_only_training_lacks_has_no_effect_where_a_model_only_answers() -> None:
    assert parse("--mtp-num-layers 1", "evaluation").without_effect == ["--mtp-num-layers"]
    assert parse("--top-p 0.9 --temperature 1", "evaluation").without_effect == ["--top-p", "--temperature"]
    assert parse("--top-p 0.9", "inference").values == {"top_p": 0.9}


@pytest.mark.parametrize("line", PUBLISHED)
def test_every_flag_of_the_published_scripts_is_known(line: str) -> None:
    name = line.split()[0]
    try:
        parsed = parse(line)
    except Refused as error:
        assert name in NOT_BUILT or line in ("--rope-scaling-type yarn",), str(error)
    else:
        assert parsed.values or parsed.without_effect or name in NOT_BUILT


def test_words_fill_the_fields_that_take_them_in_order() -> None:
    assert parse("--json a=b --tolerance 0 c", "verify").values == {
        "first": "a=b",
        "second": "c",
        "tolerance": 0.0,
        "json": True,
    }
    assert parse("--second c --first a", "verify").values == {"first": "a", "second": "c"}


@pytest.mark.parametrize(
    ("line", "command", "message"),
    [
        ("a b", "inspect", "unexpected word 'b' after a; beside its flags this command takes DIR"),
        ("a b c", "verify", "unexpected word 'c' after b; beside its flags this command takes A and [B]"),
        ("inspekt a", "convert", "unexpected word 'inspekt'; did you mean 'convert_ckpt.py inspect'?"),
        ("--overwrite verify a b", "convert", "did you mean 'convert_ckpt.py verify'?"),
        ("a --jsn", "inspect", "unknown flag --jsn; did you mean --json?"),
        ("a b --tolerance -1", "verify", "--tolerance -1.0: expected a number of at least 0"),
    ],
)
def test_words_that_cannot_be_read_are_refused(line: str, command: str, message: str) -> None:
    with pytest.raises(Refused) as error:
        parse(line, command)
    assert message in str(error.value)
