"""Damaged input files of every kind are planned or refused by name; nothing else ever happens."""

import contextlib
import io
import json
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.propose_columns import IMAGE_ROWS
from hqlabel.pipeline.inputs.read_table import inspect_tables, read_batches
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings

BOX = [1.0, 2.0, 3.0, 4.0]


def parquet_body(columns, **options) -> bytes:
    body = io.BytesIO()
    pq.write_table(pa.table(columns), body, **options)
    return body.getvalue()


LISTS = {
    "image_uri": [f"s3://b/{i}.jpg" for i in range(12)],
    "boxes": [[BOX] * (i % 3) if i % 5 else None for i in range(12)],
    "labels": [["x"] * (i % 3) if i % 4 else None for i in range(12)],
}
INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 5} for i in range(5)],
    "annotations": [{"id": i, "image_id": i % 5, "bbox": BOX, "category_id": i % 3} for i in range(9)],
    "categories": [{"id": i, "name": "é"} for i in range(3)],
}
BODIES = {
    "a.parquet": parquet_body(LISTS),
    "b.parquet": parquet_body(LISTS, compression="zstd", write_page_checksum=True, write_page_index=True),
    "a.csv": b"image_uri,x1,y1,x2,y2,label\n" + b's3://b/1.jpg,1,2,3.5,4,"c,at"\n' * 5,
    "b.csv": b'image_uri,boxes,labels\ns3://b/1.jpg,"[[1,2,3,4],[5,6,7,8]]","[""a"",""b""]"\n',
    "a.jsonl": b"".join(
        b'{"image_uri": "s3://b/%d", "boxes": [[1, 2, 3, 4]], "labels": [1]}\n' % i for i in range(5)
    ),
    "a.json": json.dumps(INSTANCES).encode(),
}
TOKENS = [
    b"null",
    b"NaN",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"\\",
    b",",
    b":",
    b"\n",
    b"\xff",
    b"\0",
    b"1e999",
    b"9" * 30,
]


def mutate(body: bytes, random: Random) -> bytes:
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(body) + 1)
        middle = random.choice(TOKENS) if random.random() < 0.5 else bytes([random.randrange(256)])
        body = random.choice(
            [
                body[:at],
                body[:at] + middle + body[at:],
                body[:at] + middle + body[at + len(middle) :],
                body[:at] + body[at + 9 :],
            ]
        )
    return body


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BODIES)), random=st.randoms(use_true_random=False))
def test_damage_anywhere_gives_a_plan_or_a_refusal_that_names_the_file(tmp_path, name, random):
    path = tmp_path / name
    path.write_bytes(mutate(BODIES[name], random))

    with contextlib.suppress(JobRefused):
        make_plan(InputSettings(boxes=str(path)))


def test_no_byte_of_a_footer_can_end_the_process(tmp_path):
    """pyarrow aborts when it is asked for the figures of a column in a footer that contradicts itself,
    as ten of these do.
    """
    body, path = BODIES["a.parquet"], tmp_path / "a.parquet"
    footer = int.from_bytes(body[-8:-4], "little")
    outcomes = set()
    for at in range(len(body) - 8 - footer, len(body)):
        path.write_bytes(body[:at] + bytes([body[at] ^ 6]) + body[at + 1 :])
        try:
            for file in inspect_tables([str(path)], IMAGE_ROWS, {}, AccessRules()):
                outcomes.add(sum(batch.num_rows for batch in read_batches(file, AccessRules())))
        except JobRefused:
            outcomes.add("refused")

    assert "refused" in outcomes
