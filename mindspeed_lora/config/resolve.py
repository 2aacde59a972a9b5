"""The rules that span several flags of a command: what is filled in, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from mindspeed_lora.config.jobs import ConversionJob, InferenceJob, Job, PreprocessJob, TrainJob

AnyJob = TypeVar("AnyJob", bound=Job)


def resolve_training(job: TrainJob, environ: Mapping[str, str]) -> TrainJob:
    """Fill in the defaults of a training job and check it."""
    return job


def resolve_inference(job: InferenceJob, environ: Mapping[str, str]) -> InferenceJob:
    """Check an inference job."""
    return job


def resolve_conversion(job: ConversionJob) -> ConversionJob:
    """Check a conversion job."""
    return job


def resolve_preprocess(job: PreprocessJob) -> PreprocessJob:
    """Check a preprocessing job."""
    return job


def with_notices(job: AnyJob, *notices: str) -> AnyJob:
    """The job with more sentences for the user."""
    return dataclasses.replace(job, notices=(*job.notices, *notices))
