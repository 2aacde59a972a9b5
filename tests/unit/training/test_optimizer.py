"""AdamW on one rank against torch's, clipping, masters, loss scaling and state."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_lora.device import runtime
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.optimizer import AdamW
from mindspeed_lora.training.session import TrainingSession
from tests.support.tiny import Tiny, open_session

LR = 3e-3


def give_gradients(session: TrainingSession, step: int, size: float = 1e-3) -> dict[str, torch.Tensor]:
    """Random gradients in the buffers, as a backward pass leaves them; a copy by parameter name."""
    generator = torch.Generator().manual_seed(step)
    given = {}
    session.optimizer.zero_grad()
    for parameter in session.trained:
        gradient = torch.randn(parameter.param.shape, generator=generator) * size
        parameter.param.main_grad.copy_(gradient)
        given[parameter.name] = gradient
    return given


def values(session: TrainingSession) -> dict[str, torch.Tensor]:
    return {p.name: p.param.detach().clone() for p in session.trained}


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def reference(
    start: dict[str, torch.Tensor], history: list[dict[str, torch.Tensor]], clip: float, **settings: float
) -> dict[str, torch.Tensor]:
    """torch's own AdamW, one parameter at a time; no decay on norms and biases, as in Megatron."""
    params = {name: torch.nn.Parameter(value.float().clone()) for name, value in start.items()}
    decay = settings.pop("weight_decay")
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, foreach=False, **settings)
    for gradients in history:
        factor = min(1.0, clip / (norm(gradients) + 1e-6)) if clip else 1.0
        for name, param in params.items():
            param.grad = gradients[name] * factor
        adam.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("lora_r", [4, None], ids=["adapter", "all parameters"])
@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_five_steps_are_those_of_torch(
    groups: ParallelGroups, tiny: Tiny, lora_r: int | None, clip: float
) -> None:
    words = tiny.words(
        lora_r=lora_r, clip_grad=clip, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6
    )
    session = open_session(words, groups)
    start = values(session)
    history = []
    for step in range(5):
        history.append(give_gradients(session, step))
        outcome = session.optimizer.step(LR)
        assert not outcome.skipped
        assert outcome.grad_norm == pytest.approx(norm(history[-1]), rel=1e-6), "before clipping"
    expected = reference(start, history, clip, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)  # type: ignore[arg-type]
    for name, found in values(session).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-7, msg=name)
        assert not torch.equal(found, start[name])
    assert session.optimizer.updates_done == 5


def test_the_rate_of_each_step_is_the_given_one(groups: ParallelGroups, tiny: Tiny) -> None:
    session = open_session(tiny.words(), groups)
    before = values(session)
    give_gradients(session, 0)
    session.optimizer.step(0.0)
    assert all(torch.equal(value, before[name]) for name, value in values(session).items())
    give_gradients(session, 1)
    session.optimizer.step(LR)
    assert not any(torch.equal(value, before[name]) for name, value in values(session).items())


def test_only_what_is_trained_has_state(groups: ParallelGroups, tiny: Tiny) -> None:
    session = open_session(tiny.words(lora_target_modules=("linear_qkv",)), groups)
    assert {owned.parameter.name.rpartition(".")[2] for owned in session.optimizer.slices} == {
        "lora_a",
        "lora_b",
    }
    held = sum(owned.master.numel() for owned in session.optimizer.slices)
    assert held == 4 * 4 * (48 + (8 + 2 * 4) * 8)


def test_zero_grad_clears_the_buffers(groups: ParallelGroups, tiny: Tiny) -> None:
    session = open_session(tiny.words(), groups)
    give_gradients(session, 0)
    session.optimizer.zero_grad()
    assert not any(parameter.param.main_grad.any() for parameter in session.trained)


def test_bf16_has_fp32_masters(groups: ParallelGroups, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of 2^-10 of the value is lost in bfloat16 each time, but not in the sum of 40."""
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: True)
    session = open_session(tiny.words(bf16=True, weight_decay=0.0, clip_grad=0), groups)
    optimizer = session.optimizer
    assert {p.param.dtype for p in session.trained} == {torch.bfloat16}
    lora_a = next(owned for owned in optimizer.slices if owned.parameter.name.endswith("lora_a"))
    start = lora_a.master.detach().clone()
    assert lora_a.master.dtype is torch.float32
    for _ in range(40):
        for parameter in session.trained:
            assert parameter.param.main_grad.dtype is torch.float32
            parameter.param.main_grad.fill_(1.0)
        optimizer.step(1e-5)
    torch.testing.assert_close(lora_a.master.detach(), start - 40e-5, rtol=0, atol=1e-6)
    for owned in optimizer.slices:
        assert torch.equal(owned.parameter.param.view(-1), owned.master.bfloat16())


def test_an_fp32_master_is_the_parameter_itself(groups: ParallelGroups, tiny: Tiny) -> None:
    session = open_session(tiny.words(), groups)
    for owned in session.optimizer.slices:
        assert owned.master.data_ptr() == owned.parameter.param.data_ptr()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_updates_nothing(
    groups: ParallelGroups, tiny: Tiny, bad: float
) -> None:
    words = tiny.words(fp16=True, initial_loss_scale=16, hysteresis=2, loss_scale_window=100)
    session = open_session(words, groups)
    optimizer = session.optimizer
    start, history = values(session), []
    scales = []
    for step, overflow in enumerate([False, True, True, False]):
        gradients = give_gradients(session, step)
        scale = optimizer.loss_scale.scale
        for parameter in session.trained:
            parameter.param.main_grad.mul_(scale)
        if overflow:
            session.trained[3].param.main_grad.view(-1)[5] = bad
        else:
            history.append(gradients)
        outcome = optimizer.step(LR)
        assert outcome.skipped is overflow
        assert math.isfinite(outcome.grad_norm) is not overflow
        scales.append(optimizer.loss_scale.scale)
    assert scales == [16, 16, 8, 8], "halved after the second overflow"
    assert optimizer.updates_done == 2, "Adam's bias correction counts updates"
    expected = reference(start, history, 1.0, weight_decay=0.01)
    for name, found in values(session).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-7, msg=name)


def test_the_norm_and_the_clip_are_of_the_unscaled_gradient(groups: ParallelGroups, tiny: Tiny) -> None:
    session = open_session(tiny.words(fp16=True, loss_scale=1024, clip_grad=0.01), groups)
    gradients = give_gradients(session, 0, size=1.0)
    for parameter in session.trained:
        parameter.param.main_grad.mul_(1024)
    before = values(session)
    assert session.optimizer.step(LR).grad_norm == pytest.approx(norm(gradients), rel=1e-6)
    expected = reference(before, [gradients], 0.01, weight_decay=0.01)
    for name, found in values(session).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-7, msg=name)


def test_state_before_the_first_step_is_zero(groups: ParallelGroups, tiny: Tiny) -> None:
    optimizer = open_session(tiny.words(), groups).optimizer
    assert optimizer.updates_done == 0
    state = optimizer.state_of(optimizer.slices[0])
    assert set(state) == {"master", "exp_avg", "exp_avg_sq"}
    assert torch.equal(state["master"], optimizer.slices[0].parameter.param.detach().view(-1))
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("bf16", [False, True])
def test_state_goes_into_another_optimizer_and_on_from_there(
    groups: ParallelGroups, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: True)
    words = tiny.words(bf16=bf16)
    whole, other = open_session(words, groups), open_session(words, groups)
    for step in range(3):
        give_gradients(whole, step)
        whole.optimizer.step(LR)
    copy_state(whole.optimizer, other.optimizer)
    assert other.optimizer.updates_done == 3
    for name, value in values(other).items():
        assert torch.equal(value, values(whole)[name]), name
    for session in (whole, other):
        give_gradients(session, 9)
        session.optimizer.step(LR)
    for name, value in values(other).items():
        assert torch.equal(value, values(whole)[name]), name


def copy_state(source: AdamW, target: AdamW) -> None:
    for old, new in zip(source.slices, target.slices, strict=True):
        state = {key: value.detach().clone() for key, value in source.state_of(old).items()}
        target.restore(new, state, source.updates_done)
    target.publish()
