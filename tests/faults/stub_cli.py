"""`hqlabel` with a model that takes no time: `python -m tests.faults.stub_cli label ...`.

All of it is the real command but the weights, which are not read, and the segmenter and decoder, which
are those of tests/fakes.py. Two variables steer the stub: STUB_SLEEP_S, how long an image takes, and
STUB_TRACE, a folder in which every model call leaves a line. STUB_FAILS_TO_START (`2:folder`) makes the
model raise at its first starts, each of which leaves a file.
"""

from __future__ import annotations

import os
from typing import Any

from hqlabel.jobs.cli import main as cli
from hqlabel.jobs.commands import retry
from hqlabel.jobs.job_setup import open_job
from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.failpoints import VARIABLE
from hqlabel.pipeline.job_context import JobContext, Weights
from hqlabel.pipeline.job_state import job_file
from hqlabel.pipeline.worker import process_env

SIDE = 64


def stub_weights(config: Config) -> Weights:
    return Weights(source="stub", sha256="5" * 64, architecture="stub", input_side=SIDE)


def stub_context(**fields: Any) -> JobContext:
    steering = {"stub_sleep_s": os.environ.get("STUB_SLEEP_S", "0")}
    for variable in ("STUB_TRACE", "STUB_FAILS_TO_START"):
        if os.environ.get(variable):
            steering[variable.lower()] = os.environ[variable]
    fields["lineage"] = {**fields["lineage"], **steering}
    stubs = {"segmenter": "tests.faults.stubs:stub_segmenter", "decoder": "tests.fakes:troubled_decoder"}
    return JobContext(**(fields | stubs))


def main() -> None:
    open_job.read_checkpoint = retry.read_checkpoint = stub_weights  # type: ignore[assignment]
    open_job.JobContext = job_file.JobContext = stub_context  # type: ignore[assignment,misc]
    process_env.REFUSED.pop(VARIABLE)  # what the real command refuses is what these tests are about
    cli.main()


if __name__ == "__main__":
    main()
