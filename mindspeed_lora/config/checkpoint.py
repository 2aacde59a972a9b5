"""What is loaded and saved."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, Section, flag


@dataclass(frozen=True, kw_only=True)
class LoadConfig(Section):
    """Where the model comes from."""

    load: str | None = flag(
        "the model: a Hugging Face folder or a Megatron checkpoint; left out: random weights"
    )
    no_load_optim: bool = flag("do not load optimizer and scheduler", False)
    no_load_rng: bool = flag("do not load the random state", False)
    no_checking: bool = flag("do not compare what is read with the checksums.json beside it", False)
    exit_on_missing_checkpoint: bool = flag("refuse to start from random weights", False)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(LoadConfig):
    """Loading, saving and resuming a training run."""

    save: str | None = flag("folder of the run: checkpoints, adapter, metrics", metavar="DIR")
    save_interval: int | None = flag(
        "steps between checkpoints; left out: one at the end", check=AT_LEAST_ONE
    )
    save_total_limit: int | None = flag("keep only the newest checkpoints, this many", check=AT_LEAST_ONE)
    save_best: bool = flag("keep the checkpoint of the best evaluation loss in <save>/best", False)
    finetune: bool = flag("take only the weights of what is loaded and start at iteration 0", False)
    no_save_optim: bool = flag("do not save optimizer and scheduler", False)
    no_save_rng: bool = flag("do not save the random state", False)
    resume: str | None = flag("auto: go on with the run in --save if there is one", choices=("auto",))
    sigterm_grace_seconds: float = flag(
        "seconds that the scheduler gives between SIGTERM and the kill; a save that may not fit is told beforehand",
        30.0,
        check=POSITIVE,
    )
    overwrite: bool = flag("replace the run that --save holds", False)
    no_shared_storage: bool = flag(
        "the nodes see different files under --save: each of them gets whole checkpoints", False
    )
    keep_chat_template: bool = flag("save the base model's chat template instead of the trained one", False)
    base_model_name: str | None = flag(
        "base_model_name_or_path of the saved adapter; left out: where it came from"
    )
