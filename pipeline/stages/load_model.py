"""From a job's checkpoint to a model that is ready to work: what a model process does first.

This is the one file of the pipeline that imports torch. A job's context names it, so that only processes that
run the model import it; others would pay 200 MB each for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hqlabel.model.checkpoints import DEMO_FOLDER, ENDINGS, CheckpointError, LoadedModel, Source, load
from hqlabel.model.device import Dtype, multiplies_bfloat16, probe_dtype, set_cpu_threads
from hqlabel.model.sam_config import ConfigError
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.errors import JobRefused, SystemicFault, clean_text
from hqlabel.pipeline.job_context import JobContext, Weights
from hqlabel.pipeline.settings import DEMO, ModelSettings
from hqlabel.pipeline.storage.read_objects import list_objects, open_input
from hqlabel.pipeline.storage.uri_rules import split_scheme
from hqlabel.pipeline.worker.process_env import keep_freed_memory


def open_weights(source: str, options: Mapping[str, Any]) -> Source:
    """Return what `checkpoints.load` takes for a checkpoint: `demo`, path, uri of a file or folder, hub id.

    Files of a remote store are opened and not yet read. Raises JobRefused when nothing is there.
    """
    if source == DEMO:
        return DEMO_FOLDER
    scheme, rest = split_scheme(source)
    if scheme == "file":
        return rest
    if source.endswith(ENDINGS):
        return open_input(source, options)
    files = list_objects(source, options)
    if not files and source.endswith("/"):
        raise JobRefused(f"{source}: there is no such folder, or it is empty")
    if not files:  # a file of any name, such as model_best.pth.tar
        return open_input(source, options)
    folder = source.rstrip("/") + "/"
    return {entry.key.removeprefix(folder): open_input(entry.key, options) for entry in files}


def load_model(weights: Weights, device: str = "cpu") -> LoadedModel:
    """Return the job's model on a device, its bytes proved to be the job's.

    Raises:
        SystemicFault: `weights`, when they cannot be read or are not what the job began with.
    """
    try:
        loaded = load(open_weights(weights.source, weights.options), device=device)
    except (CheckpointError, ConfigError, JobRefused, OSError) as error:
        raise SystemicFault("weights", clean_text(f"{weights.source}: {error}")) from error
    sha256 = loaded.weights.sha256
    if sha256 != weights.sha256:
        raise SystemicFault(
            "weights",
            f"{weights.source} has sha256 {sha256}, this job began with {weights.sha256}; put the file back, "
            "or start a new output folder",
        )
    return loaded


def load_segmenter(context: JobContext, use_gpu: bool) -> Segmenter:
    """Return the job's model with the job's settings, on the GPU that Ray gave this process or on the CPU.

    On a CPU this process computes with the job's number of threads from here on, whatever OMP_NUM_THREADS is.

    Raises:
        SystemicFault: `weights` as `load_model`, or `device`: no usable GPU, or one (or a CPU) that does
            not multiply the job's number format natively.
    """
    device, settings = "cuda" if use_gpu else "cpu", context.model
    assert settings.dtype != "auto", "resolved when the job begins"
    if not use_gpu:
        set_cpu_threads(settings.cpu_threads)
        keep_freed_memory()
    try:
        _check_device(settings, device)
        segmenter = Segmenter(
            load_model(context.weights, device).model,
            call_shape=settings.call_shape,
            dtype=settings.dtype,
            device=device,
            multimask=settings.multimask,
            hq_token_only=settings.hq_token_only,
            stability_offset=settings.stability_offset,
            compiled=settings.compile,
        )
    except (RuntimeError, AssertionError) as error:  # torch on a broken driver, or built without CUDA
        raise SystemicFault("device", clean_text(f"the model cannot be put on {device}: {error}")) from error
    weights, wanted = context.weights, (segmenter.input_side, segmenter.fit)
    if wanted != (weights.input_side, weights.fit):
        raise SystemicFault(
            "weights",
            f"{weights.source} takes images of side {wanted[0]} ({wanted[1]}), the job's were resized to "
            f"{weights.input_side} ({weights.fit})",
        )
    return segmenter


def _check_device(settings: ModelSettings, device: str) -> None:
    """Raise SystemicFault `device` unless it can make this job's masks."""
    native = multiplies_bfloat16(device)  # raises for a broken driver, before the weights are read
    if settings.dtype == "bfloat16" and not native:
        raise SystemicFault(
            "device",
            f"this job's masks are made in bfloat16, which the {device} device of this node does not "
            "multiply natively; keep such nodes out, or start a new job with model.dtype=float32",
        )
    if settings.compile and device == "cpu":
        raise SystemicFault(
            "device",
            "this job's masks are made by compiled calls (model.compile=true), and here is no GPU; "
            "resume where the GPUs are, or start a new job without it",
        )


def resolve_dtype(configured: str, use_gpu: bool) -> Dtype:
    """Return the number format that a new job with this `model.dtype` has on this process's device.

    Raises:
        SystemicFault: `device`: bfloat16, which the device only emulates.
    """
    device = "cuda" if use_gpu else "cpu"
    if configured == "auto":
        return probe_dtype(device)
    if configured == "bfloat16" and not multiplies_bfloat16(device):
        raise SystemicFault(
            "device",
            f"model.dtype=bfloat16, for which the {device} device has no instructions: it would take some 80 "
            "times as long as float32; use model.dtype=auto or float32",
        )
    return "bfloat16" if configured == "bfloat16" else "float32"
