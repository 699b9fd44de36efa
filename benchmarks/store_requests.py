"""Requests that a job sends to its store, by step and kind, counted at an S3 stand-in over HTTP.

    python -m benchmarks.store_requests 5000

Pictures lie in a bucket, the output goes into the same one. Each step is the real one with a stub for the
model; the stages of a unit run in this process, one after the other, since requests do not depend on who
calls. Counted are the requests as they arrive at moto: one line a step and kind, and what an image and a unit
cost. Prices differ by kind, so PUT and LIST stand apart from GET.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from PIL import Image
from werkzeug.serving import make_server

BUCKET = "bucket"
IMAGES_PER_UNIT = 64
SIDE = 64
BOXES = [[4.0, 5.0, 14.0, 12.0], [0.0, 0.0, 12.0, 9.0]]
FOLDERS = ("photos", "plan", "units", "attempts", "owner", "instances", "images")


class Counting:
    """A WSGI application around another that counts requests by kind and folder of their key."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self.counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.counts[kind_of(environ), folder_of(environ["PATH_INFO"])] += 1
        return self._application(environ, start_response)

    def take(self) -> Counter[tuple[str, str]]:
        """The counts since the last call."""
        taken, self.counts = self.counts, Counter()
        return taken


def kind_of(environ: dict[str, Any]) -> str:
    """The name of the request as it is priced and granted."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    if method == "GET" and ("list-type" in query or environ["PATH_INFO"].count("/") < 2):
        return "LIST"
    return "PUT (multipart)" if "uploadId" in query or "uploads" in query else method


def folder_of(path: str) -> str:
    """The first folder of a key that is one of a job's, else `other`."""
    return next((part for part in path.split("/")[2:] if part in FOLDERS), "other")


def main() -> None:
    """Count the steps of one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", type=int, nargs="?", default=5000)
    images = parser.parse_args().images
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    counting = Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, counting, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        run(f"http://127.0.0.1:{server.server_port}", counting, Path(name), images)
    server.shutdown()


def run(endpoint: str, counting: Counting, folder: Path, images: int) -> None:
    """All steps of one job, each with its requests printed."""
    from hqlabel.pipeline.job_context import AccessRules, BoxRules, JobContext, Place, Weights
    from hqlabel.pipeline.job_state.driver_lock import Owner
    from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job, require_job, units_per_part
    from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
    from hqlabel.pipeline.settings import FilterSettings, InputSettings, Limits, ModelSettings
    from hqlabel.pipeline.stages.rows_between_stages import UnitRow
    from hqlabel.pipeline.storage.output_store import Store
    from hqlabel.pipeline.tables.job_status import status
    from hqlabel.pipeline.tables.manifest import read_manifest
    from hqlabel.pipeline.tables.publish_tables import publish
    from hqlabel.pipeline.tables.unit_files import list_committed
    from hqlabel.pipeline.tables.verify_output import verify
    from tests.faults.chain import do_unit

    options = {"endpoint_url": endpoint}
    write_inputs(fsspec.filesystem("s3", endpoint_url=endpoint), folder, images)
    counting.take()
    access = AccessRules(options={"s3": options})
    where = f"s3://{BUCKET}/photos"
    plan = make_plan(
        InputSettings(images=where, boxes=str(folder / "boxes.parquet")),
        access,
        images_per_unit=IMAGES_PER_UNIT,
    )
    units = plan.summary.units
    say("list and plan", counting, images, units)
    store = Store(Place(uri=f"s3://{BUCKET}/out", options=options))
    context = JobContext(
        output=store.place, plan_sha256=plan.sha256, images_per_unit=IMAGES_PER_UNIT, run_id="bench",
        weights=Weights(source="none", sha256="0" * 64, architecture="stub", input_side=SIDE),
        model=ModelSettings(dtype="float32", boxes_per_call=16), box_rules=BoxRules(),
             access=plan.access, limits=Limits(),
        segmenter="tests.fakes:box_segmenter",
    )  # fmt: skip
    boxes = images * len(BOXES)
    parts = units_per_part(images=images, boxes=boxes, images_per_unit=IMAGES_PER_UNIT)
    planned = {"images": images, "boxes": boxes, "units": units}
    identity = identity_of(context, inputs={}, limit=None, protocol=1)
    job = open_job(store, Job(identity=identity, context=context, plan=planned, units_per_part=parts))
    write_plan(store, plan)
    say("job and plan written", counting, images, units)
    with Owner.take(store) as owner:
        began = time.monotonic()
        for unit_id in range(units):
            do_unit(UnitRow(unit_id=unit_id), job.context, epoch=owner.number)
        print(f"label took {time.monotonic() - began:.0f} s", flush=True)
        say("label", counting, images, units)
        publish(store, job, FilterSettings(), require_owner=owner.require)
        say("publish", counting, images, units)
    counting.take()
    job = require_job(store, access=access)
    assert len(list_committed(store)) == units
    assert read_manifest(store) is not None
    say("resume: read the job, list what is there", counting, images, units)
    assert status(store, job).complete
    say("status", counting, images, units)
    assert verify(store, job).findings == []
    say("validate", counting, images, units)


def say(step: str, counting: Counting, images: int, units: int) -> None:
    """One line a step, and one for each kind of request in it."""
    counts = counting.take()
    total = sum(counts.values())
    print(f"{step}: {total} requests, {total / images:.4f} an image, {total / units:.2f} a unit")
    for (kind, folder), number in sorted(counts.items(), key=lambda one: -one[1]):
        print(f"    {kind:<16}{folder:<12}{number:>7}  {number / units:8.2f} a unit", flush=True)


def write_inputs(s3: Any, folder: Path, images: int) -> None:
    """So many small pictures in the bucket, and a table of boxes on the disk."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    names = [f"{number % 10}/{number:08d}.png" for number in range(images)]
    s3.mkdir(BUCKET)
    stand_in = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for name in names:  # not over HTTP, which would take as long as all the rest
        stand_in.put_object(BUCKET, f"photos/{name}", buffer.getvalue())
    pq.write_table(pa.table({"image_id": names, "boxes": [BOXES] * images}), folder / "boxes.parquet")


if __name__ == "__main__":
    main()
