import numpy as np

from mindspeed_lora.data.outcome import Outcome
from mindspeed_lora.data.summary import Summary


def kept(length: int, loss: int, was_cut: bool = False) -> Outcome:
    return Outcome((np.zeros(length, dtype=np.int32),) * 3, num_loss_tokens=loss, was_cut=was_cut)


def test_counts_and_text() -> None:
    summary = Summary()
    tokens = [
        summary.add(outcome)
        for outcome in (
            kept(10, 4),
            kept(24, 6, was_cut=True),
            Outcome(reason="the text is empty"),
            Outcome(reason="the text is empty"),
            Outcome(reason="too long"),
        )
    ]
    assert tokens == [10, 24, 0, 0, 0]
    assert (summary.read, summary.kept, summary.cut, summary.longest) == (5, 2, 1, 24)
    assert (summary.tokens, summary.loss_tokens) == (34, 10)
    assert summary.text(2.0).splitlines() == [
        "rows read                5",
        "rows kept                2",
        "  of them cut            1  to --seq-length",
        "rows dropped             3",
        "                         2  the text is empty",
        "                         1  too long",
        "tokens                  34  17.0 a row",
        "  with loss             10  29.4%",
        "time                  2.0s  17 tokens/s",
        "rows by length in tokens",
        *[f"{f'{i}-{i + 1}':>14}            0" for i in (1, 3, 5, 7)],
        f"{'9-10':>14}            1  {'#' * 40}",
        *[f"{f'{i}-{i + 1}':>14}            0" for i in range(11, 23, 2)],
        f"{'23-24':>14}            1  {'#' * 40}",
    ]


def test_nothing_kept() -> None:
    assert "rows by length" not in Summary().text(0.0)
