from __future__ import annotations

import pytest

from mindspeed_lora.config.commands import COMMANDS, grammar
from mindspeed_lora.config.help import help_text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_every_flag(command: str) -> None:
    text = help_text(command)
    words = set(text.replace(",", " ").split())
    assert grammar(command).options.keys() <= words
    assert max(map(len, text.splitlines())) <= 110
    assert "``" not in text


def test_help_tells_defaults_and_choices() -> None:
    text = " ".join(help_text("posttrain").split())
    assert "--loss-normalization token|micro-batch" in text
    assert "seed of data order, starting values and dropout (default: 1234)" in text
    assert "--use-flash-attn" in text
