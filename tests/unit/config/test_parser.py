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
