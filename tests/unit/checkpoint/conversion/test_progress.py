from __future__ import annotations

import pytest
import torch

from mindspeed_lora.checkpoint.conversion.progress import Progress, count_not_finite, readable_size
from mindspeed_lora.checkpoint.source import open_source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype):
    tensor = torch.full((1000, 70), torch.finfo(dtype).max, dtype=dtype)
    assert count_not_finite(tensor) == 0
    tensor[3, 5], tensor[4, 5], tensor[5, 5] = float("inf"), float("-inf"), float("nan")
    assert count_not_finite(tensor) == 3
    assert count_not_finite(tensor[:, 5:6]) == 3
    assert count_not_finite(torch.empty(0, 3, dtype=dtype)) == 0


def test_sizes():
    sizes = [readable_size(count) for count in (999, 1500, 2_500_000, 141_000_000_000)]
    assert sizes == ["999 B", "1.5 kB", "2.5 MB", "141.00 GB"]


def test_off_a_terminal_lines_are_rare_and_whole(models, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("mindspeed_lora.checkpoint.conversion.progress.time.monotonic", lambda: next(clock))
    source = open_source(models("llama").path)
    progress = Progress(source)
    for name in source.names()[:6]:
        progress(name, None, source.read(name))
    progress("embedding.word_embeddings.weight", None, source.read("embedding.word_embeddings.weight"))
    progress.finish("somewhere", 74_900)
    output = capsys.readouterr().out
    assert "\r" not in output
    lines = output.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("wrote somewhere: 27 tensors, 74.9 kB, ")
    assert lines[0].startswith("3/27 tensors, ") and "left" in lines[0]
