"""megatron-core is imported without torch's compiler, which its decorators get when they are first called."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from mindspeed_lora.device.megatron_import import _compile_at_first_call

PROGRAM = """
import sys, torch
from mindspeed_lora.device.megatron_import import import_megatron
before = torch.compile
import_megatron()
assert torch.compile is before
assert "megatron.core.transformer" in sys.modules
assert not {"torch._dynamo", "torch._inductor"} & sys.modules.keys()
import mindspeed_lora.training.main
print(sorted({"torch._dynamo", "torch._inductor", "transformers", "matplotlib"} & sys.modules.keys()))
"""


def test_what_a_training_command_imports() -> None:
    """Neither the compiler nor transformers, which takes as long, before a first step needs it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_first_call_compiles_once() -> None:
    compiled: list[Any] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return function

    @lambda function: _compile_at_first_call(compile_now, function, mode="m")
    def double(number: int) -> int:
        """Twice."""
        return 2 * number

    assert compiled == [] and double.__doc__ == "Twice."
    assert [double(2), double(3)] == [4, 6]
    assert compiled == [{"mode": "m"}]
    with_options = _compile_at_first_call(compile_now, dynamic=True)(len)
    assert with_options([1, 2]) == 2 and compiled[1:] == [{"dynamic": True}]
