"""The live parts of a run on one rank: model, optimizer, batches, writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora import __version__
from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.dtypes import FLAG_DTYPES
from mindspeed_lora.checkpoint.loading.checking import check_share
from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter, trainable
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.device import compute_dtype
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.layer import interleave_layers
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.collectives import all_gather_objects, all_reduce_sum, together
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.data_parallel import wrap_chunks
from mindspeed_lora.training.experts import RouterLosses, expert_settings
from mindspeed_lora.training.fusion import fusion_notices, fusion_scheduler, interleaving
from mindspeed_lora.training.gradients import GradientFinalizer
from mindspeed_lora.training.model_files import ModelFiles
from mindspeed_lora.training.optimizer import AdamW
from mindspeed_lora.training.optimizer_files import read_optimizer
from mindspeed_lora.training.plan import TrainPlan
from mindspeed_lora.training.reporting import ParameterCounts
from mindspeed_lora.training.run_folder import OPTIMIZER_FOLDER
from mindspeed_lora.training.saving import RunWriter, load_random_states
from mindspeed_lora.training.step import StepRunner
from mindspeed_lora.training.storage import check_same_start, find_storage


class TrainingSession:
    """Built from a plan on every rank; the loop drives it."""

    def __init__(self, plan: TrainPlan, groups: ParallelGroups) -> None:
        job = plan.job
        self.plan = plan
        self.groups = groups
        self.notices: list[str] = []
        check_same_start(plan.start.run.iteration if plan.start.run is not None else None, groups)
        self.dtype, notice = compute_dtype(job.training.bf16, job.training.fp16)
        if notice:
            self.notices.append(notice)
        # Micro-batches differ in length, and the last one of an evaluation in rows, so stages tell each other.
        self.config = transformer_config(
            plan.shape, job.parallel, groups, self.dtype, job.training, variable_seq_lengths=True
        )
        self.chunks, self.chunk_parameters = self._build()
        self.parameters = [parameter for chunk in self.chunk_parameters for parameter in chunk]
        self.trained = trainable(self.parameters)
        self.model = wrap_chunks(self.chunks, self.config, job.parallel, groups)
        """The chunks in their data-parallel wrappers."""
        self.optimizer = together(
            groups, lambda: AdamW(self.model, self.trained, job.training, groups, plan.paging)
        )
        finalizer = GradientFinalizer(self.model, self.trained, groups)
        self.config.finalize_model_grads_func = finalizer
        if job.training.fp16:
            self.config.grad_scale_func = lambda loss: loss * self.optimizer.loss_scale.scale
        mean_of_micro_batches = job.training.loss_normalization == "micro-batch"
        drops = plan.adapter is not None and plan.adapter.spec.dropout > 0
        self.runner = StepRunner(
            self.model,
            finalizer,
            groups,
            mean_of_micro_batches,
            job.training.seed if drops else None,
            RouterLosses(self.chunks, groups, expert_settings(job.routing)) if plan.shape.moe else None,
        )
        dealt = groups.dp_rank, groups.dp_size, plan.pad_to, plan.placement.micro_batch_multiple
        self.batches = plan.rows.train_batches(*dealt)
        self.evaluation: Iterable[list[Batch]] | None = plan.rows.eval_batches(*dealt)
        self.test: Iterable[list[Batch]] | None = plan.rows.test_batches(*dealt)
        self.restored_state: dict[str, Any] = {}
        self._restore()
        self.writer = self._writer()

    def _build(self) -> tuple[list[GPTModel], list[list[LocalParameter]]]:
        """The chunks of this rank, and the parameters of each."""
        plan, groups = self.plan, self.groups
        scheduler = fusion_scheduler(plan, groups, self.dtype)
        divisible_by = plan.job.model.make_vocab_size_divisible_by or 1
        settings = expert_settings(plan.job.routing)
        together(groups, lambda: check_share(plan.source, groups))
        built = together(
            groups,
            lambda: [
                build_model(
                    plan.shape,
                    self.config,
                    groups,
                    plan.source,
                    plan.adapter,
                    divisible_by,
                    chunk,
                    scheduler,
                    settings,
                    plan.quantization,
                )
                for chunk in plan.placement.rank_chunks(groups.pp_rank)
            ],
        )
        by_turns = interleaving(plan, scheduler, groups, self.dtype)
        for gpt, _ in built:
            interleave_layers(gpt, by_turns)
        self.notices += [*fusion_notices(plan), *scheduler.lines]
        return [gpt for gpt, _ in built], [parameters for _, parameters in built]

    def _restore(self) -> None:
        """Optimizer, loss scale and random state of the checkpoint that the run goes on from."""
        start = self.plan.start
        if start.run is None:
            return
        folder, self.restored_state = start.run.folder, start.run.state
        if start.load_optimizer:
            self._restore_optimizer(folder)
        rank = self.groups.rank
        if start.load_random_state and not together(self.groups, lambda: load_random_states(folder, rank)):
            self.notices.append(f"{folder} holds no random state of rank {rank}; it starts from --seed")

    def _restore_optimizer(self, folder: Path) -> None:
        files = folder / OPTIMIZER_FOLDER
        if not files.is_dir():
            self.notices.append(f"{folder} holds no optimizer state; the optimizer starts anew")
            return
        updates = int(self.restored_state.get("updates_done", self.restored_state["iteration"]))
        together(self.groups, lambda: read_optimizer(files, self.optimizer, updates))
        self.optimizer.publish()
        self.optimizer.loss_scale.restore(self.restored_state["loss_scale"])

    def _writer(self) -> RunWriter | None:
        job, plan = self.plan.job, self.plan
        if job.checkpoint.save is None:
            return None
        whole_model = plan.adapter is None or job.lora.lora_save_base
        return RunWriter(
            save=Path(job.checkpoint.save),
            checkpoint=job.checkpoint,
            groups=self.groups,
            storage=find_storage(Path(job.checkpoint.save), self.groups, job.checkpoint.no_shared_storage),
            shape=plan.shape,
            optimizer=self.optimizer,
            adapter=plan.adapter,
            adapter_dtype=FLAG_DTYPES[job.lora.lora_save_dtype or "fp32"],
            base_model_name=plan.base_model_name,
            write_tokenizer=plan.rows.tokenizer_writer(plan.tokenizer, job.checkpoint.keep_chat_template),
            has_new_words=job.tokenizer.add_tokens is not None,
            model_files=self._model_files() if whole_model else None,
        )

    def _model_files(self) -> ModelFiles:
        divisible_by = self.plan.job.model.make_vocab_size_divisible_by or 1
        return ModelFiles(
            shape=self.plan.shape,
            source=self.plan.source,
            chunks=self.chunk_parameters,
            placement=self.plan.placement,
            params_dtype=str(self.dtype).removeprefix("torch."),
            padded_vocab_size=padded_vocab_size(self.plan.shape, divisible_by, self.groups.tp_size),
            groups=self.groups,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the session."""
        training = self.plan.job.training
        return {
            "version": __version__,
            "updates_done": self.optimizer.updates_done,
            "loss_scale": self.optimizer.loss_scale.state(),
            "global_batch_size": training.global_batch_size,
            "seed": training.seed,
            "learning_rate": dataclasses.asdict(self.plan.learning_rate),
            "layout": self.plan.layout.state(),
            "base_model_name": self.plan.base_model_name,
            "documents": len(self.plan.rows.train),
            "blend": self.plan.rows.blend,
            "quantization": None if self.plan.quantization is None else self.plan.quantization.state(),
            **self._adapter_state(),
        }

    def _adapter_state(self) -> dict[str, Any]:
        """What an adapter's files leave open: which linears' matrices share one A because they are one matrix."""
        adapter = self.plan.adapter
        return {} if adapter is None else {"shared_factors": sorted(adapter.shared)}

    def parameter_counts(self) -> ParameterCounts:
        """Trained and all parameters of the unsharded model, each counted once, and what each rank holds."""
        counted = [p for p in self.parameters if p.counted and p.copy_rank == 0]
        counts = torch.tensor([sum(p.param.numel() for p in counted), sum(p.num_trained for p in counted)])
        all_reduce_sum(counts, self.groups.control_group)
        total, trained = counts.tolist()
        held = all_gather_objects(sum(p.param.numel() for p in self.parameters), self.groups)
        return ParameterCounts(total=total, trainable=trained, per_rank=tuple(held))
