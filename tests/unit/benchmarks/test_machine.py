import re

from comparison.machine import commit, machine, versions


def test_what_a_figure_depends_on_is_told() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e9
    assert {"mindspeed_lora", "python", "torch", "megatron-core"} <= set(versions())


def test_the_commit_is_told_where_there_is_one() -> None:
    found = commit()
    assert found == {} or re.fullmatch("[0-9a-f]{40}", found["sha"])
