"""`hqlabel doctor`: what this machine offers, and what would stop a job here, before any job is run.

Every check yields a `Check`; one that fails ends the command with exit code 4. Probes use the real
thing: an object is written and read back, Ray is started and runs a task, the weights are read whole.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hqlabel.jobs.cluster.ray_cluster import running_ray, usable_cpus
from hqlabel.jobs.cluster.ray_session import memory_bytes
from hqlabel.jobs.job_setup.answering_stores import require_answers
from hqlabel.jobs.job_setup.check_models import read_checkpoint, read_detector
from hqlabel.jobs.job_setup.resolve_settings import is_local, output_place
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.model.device import probe_dtype
from hqlabel.pipeline.errors import HqlabelError, clean_text, count
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.worker.process_env import REFUSED, loosening_in

State = Literal["ok", "note", "fail"]

# The version below which a known hole is open; each is checked here, because pins can be overridden.
_FLOORS = {
    "ray": (2, 60),
    "pillow": (12, 3),
    "torch": (2, 6),
    "pyarrow": (14, 0, 1),
    "pycocotools": (2, 0, 5),
}
_PACKAGES = ["ray", "torch", "pyarrow", "pillow", "numpy", "pycocotools", "fsspec", "safetensors", "duckdb"]
_EXTRAS = {
    "s3fs": "s3",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "transformers": "detect",
    "faster-coco-eval": "eval",
}
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_SMALL_SHM = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """The result of one check. `name`: of what; `text`: what was found and what to do."""

    name: str
    state: State
    text: str


USES = ("model", "detector", "output.uri", "cluster", "storage")
"""The settings that the command takes from the call."""


def run(config: Config, *, with_ray: bool, json: bool) -> int:
    """Check everything, print it, and return 0, or 4 when something would stop a job."""
    checks: list[dict[str, str]] = []
    for area, results in _areas(config, with_ray).items():
        for place, check in enumerate(results):
            checks.append({"area": area, **vars(check)})
            if not json:
                _print(check, area=area if place == 0 else None)
    failed = sum(check["state"] == "fail" for check in checks)
    if json:
        console.data_json({"sound": not failed, "findings": checks})
    console.say(f"\n{count(failed, 'problem')} found" if failed else "\nnothing here would stop a job")
    return 4 if failed else 0


def _areas(config: Config, with_ray: bool) -> dict[str, Iterable[Check]]:
    """Return the checks by area, each run when it is asked for."""
    return {
        "versions": versions(),
        "environment": environment(),
        "machine": machine(),
        "job": job(config),
        "ray": map(ray, [config] if with_ray else []),
    }


def job(config: Config) -> Iterator[Check]:
    """Check what the configuration names: checkpoint, detector, output."""
    if config.model.checkpoint:
        yield checkpoint(config)
    if config.detector.name:
        yield detector(config)
    if config.output.uri:
        yield output(config)


def versions() -> Iterator[Check]:
    """Python, the packages against their security floors, and which extras are installed."""
    yield Check("hqlabel", "ok", _version("hqlabel") or "not installed: a checkout")
    yield Check("python", "ok", f"{platform.python_version()} ({platform.platform()})")
    for package in _PACKAGES:
        found = _version(package)
        floor = _FLOORS.get(package)
        if found is None:
            yield Check(package, "fail", "not installed; run `make setup`")
        elif floor is not None and _numbers(found) < floor:
            wanted = ".".join(map(str, floor))
            yield Check(package, "fail", f"{found}; wanted {wanted} or later")
        else:
            yield Check(package, "ok", found)
    for package, extra in _EXTRAS.items():
        found = _version(package)
        text = found or f"not installed; for it: pip install 'hqlabel[{extra}]'"
        yield Check(package, "ok" if found else "note", text)


def environment() -> Iterator[Check]:
    """Check the environment variables that a job refuses to start with."""
    found = loosening_in(os.environ, REFUSED)
    for name, why in found.items():
        yield Check(name, "fail", f"is set: it {why}; unset it")
    if not found:
        text = f"none of the {len(REFUSED)} variables that a job refuses is set"
        yield Check("switches", "ok", text)


def machine() -> Iterator[Check]:
    """CPU, memory, shared memory and GPUs, and the number format the model would use on each."""
    flags = " ".join(_cpu_flags()) or "no flags known"
    cores = f"{usable_cpus()} of {os.cpu_count()} cores usable; {flags}"
    yield Check("cpu", "ok", f"{cores}; model.dtype auto: {probe_dtype('cpu')}")
    yield Check("memory", "ok", console.size(memory_bytes()))
    yield from _shared_memory()
    if not torch.cuda.is_available():
        yield Check("gpu", "note", "none: the model runs on the CPU, slowly")
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _shared_memory() -> Iterator[Check]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    free = shutil.disk_usage(shm).free
    if free < _SMALL_SHM:
        text = f"{console.size(free)} free in /dev/shm, the rest goes to disk; containers: --shm-size=4g"
        yield Check("shared memory", "note", text)
    else:
        yield Check("shared memory", "ok", f"{console.size(free)} free")


def _gpu(index: int) -> Check:
    name = f"gpu {index}"
    try:
        facts = torch.cuda.get_device_properties(index)
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:
        return Check(name, "fail", f"does not compute: {error}")
    text = (
        f"{facts.name}, {console.size(facts.total_memory)}; model.dtype auto: {probe_dtype(f'cuda:{index}')}"
    )
    return Check(name, "ok", text)


def checkpoint(config: Config) -> Check:
    """Check whether the checkpoint is whole and of a known architecture, with its sha256 and licence."""
    try:
        weights = read_checkpoint(config)
    except HqlabelError as error:
        return Check("checkpoint", "fail", str(error))
    parts = [weights.architecture, f"input side {weights.input_side}", f"sha256 {weights.sha256}"]
    parts.append(f"licence {weights.license}" if weights.license else "licence unknown: ask its publisher")
    parts += [note for note in (weights.note, weights.warning) if note]
    state: State = "note" if weights.warning else "ok"
    return Check("checkpoint", state, "; ".join(parts))


def detector(config: Config) -> Check:
    """Check whether the detector loads and answers a blank picture, with its fingerprint and licence."""
    try:
        found = read_detector(config)
    except HqlabelError as error:
        return Check("detector", "fail", str(error))
    return Check("detector", "ok", str(found))


def output(config: Config) -> Check:
    """Check whether this user may write, create once, read and list at the output; writes a probe."""
    place = output_place(config)
    try:
        require_answers(config)
        store = Store(place)
        key = f".doctor-{uuid.uuid4().hex}"
        created, again = store.put_if_absent(key, b"probe"), store.put_if_absent(key, b"other")
        sound = created and not again and store.read(key) == b"probe" and bool(store.list(key))
        left = _remove_probe(config, key)
    except HqlabelError as error:
        return Check("output", "fail", str(error))
    if not sound:
        text = f"{place.uri} does not keep the first of two writers; a job there could lose work"
        return Check("output", "fail", text)
    return Check("output", "ok", f"{place.uri}: write once, read, list work{left}")


def _remove_probe(config: Config, key: str) -> str:
    try:
        Store(output_place(config)).delete([key])
    except HqlabelError:
        return f"; no right to delete (only `clean` needs it), so {key} stays"
    if is_local(config.output.uri or ""):  # leave no new empty folder behind
        folder = Path(output_place(config).uri)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return ""


def ray(config: Config) -> Check:
    """Check whether Ray starts here, or the named cluster answers, and runs a task."""
    try:
        with running_ray(config.cluster, os.environ) as info:
            import ray as library

            def where() -> int:  # a function of Python's own, which travels by value: jobs/ does not travel
                return os.getpid()

            answer = library.get(library.remote(num_cpus=0.1)(where).remote(), timeout=120)
    except HqlabelError as error:
        return Check("ray", "fail", str(error))
    except Exception as error:
        reason = clean_text(f"{type(error).__name__}: {error}".splitlines()[0])
        return Check("ray", "fail", f"no task ran within 120 s: {reason}")
    return Check("ray", "ok", f"{info}; a task ran in process {answer}")


def _print(check: Check, *, area: str | None) -> None:
    if area is not None:
        console.data(area)
    mark = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[check.state]
    console.data(f"  {mark}  {check.name:<18}  {check.text}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _cpu_flags() -> list[str]:
    """Of the flags that decide how fast matrices are multiplied, those that the CPU has; Linux only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return [flag for flag in _CPU_FLAGS if flag in words]
