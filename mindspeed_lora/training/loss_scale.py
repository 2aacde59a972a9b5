"""Loss scaling for float16: a fixed factor, or one that follows overflows (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from mindspeed_lora.config.training import TrainingConfig


class LossScale:
    """The factor on the loss; 1 outside of float16.

    Dynamic: halved after ``hysteresis`` overflows in a row of overflowing steps, doubled after ``window`` steps
    without one.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.dynamic = training.fp16 and training.loss_scale is None
        initial = training.initial_loss_scale if self.dynamic else training.loss_scale
        self.scale = (initial or 1.0) if training.fp16 else 1.0
        self.minimum = training.min_loss_scale
        self.window = training.loss_scale_window
        self.hysteresis = training.hysteresis
        self.overflows_left = training.hysteresis
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        """Takes note of a step's outcome."""
        if not self.dynamic:
            return
        if overflow:
            self.good_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.good_steps = 0
            self.overflows_left = self.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "overflows_left": self.overflows_left,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from a checkpoint."""
        if self.dynamic:
            self.scale = state["scale"]
            self.good_steps = int(state["good_steps"])
            self.overflows_left = int(state["overflows_left"])
