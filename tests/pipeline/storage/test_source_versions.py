"""The bytes that were planned are the bytes that are used: archives, rows of Parquet, and tables."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.inputs.box_tables import read_box_tables
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.job_state.plan_files import count_images, iter_plan, read_unit
from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
from hqlabel.pipeline.schema import PLAN, PLAN_BEFORE
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage import checksummed_parquet, read_archives
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import one_version_each, open_input
from tests.pipeline.made_formats import PICTURES, hf_rows, sample, tar_of
from tests.s3_proxy import Fault

LIMITS = Limits(fetch_timeout_s=10)
RED, WHITE = b"r" * 600, b"w" * 600


def outcome(row: dict, access: AccessRules, *, planned: bool = True) -> str:
    """What a planned image comes to in a fresh process: its bytes' first letter, or its code."""
    read_archives._groups._kept.clear()
    version = row["source_version"] if planned else None
    try:
        return chr(fetch_object(row["image_uri"], access, LIMITS, version).data[0])
    except ImageError as error:
        return error.code


def rewritten(path, data: bytes) -> None:
    """Write a file anew as `cp --preserve` of another one would: same size, same times."""
    before = os.stat(path)
    path.write_bytes(data)
    assert os.stat(path).st_size == before.st_size, "or the size alone would show it"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


KINDS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem", ["", "übung/", "/".join(["ordner"] * 20) + "/"])
def test_a_member_under_another_name_is_not_taken_though_size_and_time_are_the_same(tmp_path, kind, stem):
    if kind == "ustar" and len(stem) > 90:
        pytest.skip("ustar has no such names")
    members = {f"{stem}red.bmp": RED, f"{stem}wht.bmp": WHITE}
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members, kind=KINDS[kind]))
    plan = make_plan(InputSettings(images=str(tmp_path)))
    rows = plan.table.to_pylist()
    assert [outcome(row, plan.access) for row in rows] == ["r", "w"]

    rewritten(path, tar_of(dict(reversed(members.items())), kind=KINDS[kind]))

    assert [outcome(row, plan.access) for row in rows] == ["changed", "changed"]
    assert [outcome(row, plan.access, planned=False) for row in rows] == ["changed", "changed"]


def test_a_name_behind_a_long_header_is_found_by_a_second_look(tmp_path):
    header = tarfile.TarInfo("übung.bmp")
    header.size, header.pax_headers = len(RED), {"comment": "x" * 40_000}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(RED))

    plan = make_plan(InputSettings(images=str(tmp_path)))

    assert [outcome(row, plan.access) for row in plan.table.to_pylist()] == ["r"]


def picture_rows(order: list[int], *, paths: bool) -> bytes:
    pictures = [{"bytes": (RED, WHITE)[at], "path": f"{at}.png" if paths else None} for at in order]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(pictures, kind)}), buffer, compression="none")
    return buffer.getvalue()


def test_rows_that_changed_places_are_told_by_their_paths_and_else_by_the_files_version(tmp_path):
    for paths in (True, False):
        path = tmp_path / f"{paths}.parquet"
        path.write_bytes(picture_rows([0, 1], paths=paths))
        plan = make_plan(InputSettings(images=str(path)))
        rows = plan.table.to_pylist()
        assert [outcome(row, plan.access) for row in rows] == ["r", "w"]

        if paths:
            rewritten(path, picture_rows([1, 0], paths=paths))
            assert [outcome(row, plan.access, planned=False) for row in rows] == ["changed", "changed"]
        path.write_bytes(picture_rows([1, 0], paths=paths))
        assert [outcome(row, plan.access) for row in rows] == ["changed", "changed"]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_another_version_of_the_same_names_and_sizes_is_not_taken(kind, tmp_path, request):
    store, access = place_of(kind, tmp_path, request)
    files = {"0.tar": tar_of({"a.png": RED}), "0.parquet": picture_rows([0], paths=True)}
    other = {"0.tar": tar_of({"a.png": WHITE}), "0.parquet": picture_rows([1], paths=False)}
    for name, data in files.items():
        store.put(f"d/{name}", data)
        plan = make_plan(InputSettings(images=f"{store.place.uri}/d/{name}"), access)
        [row] = plan.table.to_pylist()
        assert outcome(row, plan.access) == "r"
        fetched = fetch_object(row["image_uri"], plan.access, LIMITS, row["source_version"])
        assert fetched.etag == row["source_version"] is not None

        store.put(f"d/{name}", other[name])
        assert outcome(row, plan.access) == "changed", name

        store.put(f"d/{name}", data)  # put back: the store's etag is of the bytes
        assert outcome(row, plan.access) == ("r" if kind == "s3" else "changed")


def place_of(kind: str, tmp_path, request) -> tuple[Store, AccessRules]:
    if kind == "s3":
        moto = request.getfixturevalue("moto_s3")
        return Store(moto.place()), AccessRules(options={"s3": moto.options})
    from hqlabel.pipeline.job_context import Place

    return Store(Place(uri=str(tmp_path / "store"))), AccessRules(roots=(str(tmp_path / "store"),))


def test_pictures_in_archives_always_have_a_tag_also_in_plans_without_versions(tmp_path, moto_s3):
    store = Store(moto_s3.place())
    store.put("0.tar", tar_of({"a.png": RED}))
    store.put("0.parquet", picture_rows([0], paths=True))
    (tmp_path / "0.tar").write_bytes(tar_of({"a.png": RED}))
    access = AccessRules(roots=(str(tmp_path),), options={"s3": moto_s3.options})
    for folder, name in itertools.product((store.place.uri, str(tmp_path)), ("0.tar", "0.parquet")):
        if folder == str(tmp_path) and name == "0.parquet":
            continue
        plan = make_plan(InputSettings(images=f"{folder}/{name}"), access)
        for version in (plan.table["source_version"][0].as_py(), None):
            assert fetch_object(plan.table["image_uri"][0].as_py(), plan.access, LIMITS, version).etag


def test_uris_into_archives_that_a_table_names_have_versions_and_refused_ones_are_not_opened(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.tar").write_bytes(tar_of({"a.png": RED}))
    uris = [f"{folder}/a.tar#512:600/a.png" for folder in (inside, outside)] + [f"{inside}/no.tar#512:1/b"]
    (inside / "t.csv").write_text("image_uri\n" + "\n".join(uris) + "\nplain.png\n")

    table = make_plan(InputSettings(images=str(inside / "t.csv"), allow_unmatched=True)).table.to_pylist()

    tags = {row["image_uri"]: row["source_version"] for row in table}
    assert tags[uris[0]].startswith("mtime-")
    assert [tags[uris[1]], tags[uris[2]], tags[f"{inside}/plain.png"]] == [None, None, None]


def test_images_that_are_files_have_no_version_in_a_plan_and_its_hash_is_as_before(tmp_path):
    from hqlabel.pipeline.arrow_lists import table_sha256

    for name, data in PICTURES.items():
        (tmp_path / f"{name.replace('/', '-')}.png").write_bytes(data)

    plan = make_plan(InputSettings(images=str(tmp_path)))

    assert plan.table["source_version"].null_count == plan.table.num_rows == 4
    assert plan.sha256 == table_sha256(plan.table.select(PLAN_BEFORE.names))


def test_a_plan_that_an_earlier_version_wrote_is_read(local_store, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(sample("a/1") | sample("b/3")))
    plan = make_plan(InputSettings(images=str(tmp_path / "a.tar")), images_per_unit=1)
    write_plan(local_store, plan)
    [entry] = local_store.list("plan/")
    sink = checksummed_parquet.ParquetSink(PLAN_BEFORE, {}, row_group_rows=1)
    sink.write(plan.table.select(PLAN_BEFORE.names))
    local_store.put(entry.key, sink.finish())

    rows = read_unit(local_store, plan.sha256, 1)

    assert rows.schema == PLAN
    assert rows["source_version"].to_pylist() == [None]
    assert count_images(local_store, plan.sha256) == 2
    assert [table.schema for table in iter_plan(local_store, plan.sha256)] == [PLAN, PLAN]
    assert fetch_object(rows["image_uri"][0].as_py(), plan.access, LIMITS).etag


def test_a_member_far_past_the_end_of_a_local_archive_is_changed(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(sample("a/1")))
    plan = make_plan(InputSettings(images=str(tmp_path / "a.tar")))
    uri = plan.table["image_uri"][0].as_py()
    far = re.sub(r"#\d+", "#99999999999904", uri)
    assert far != uri
    with pytest.raises(ImageError) as caught:
        fetch_object(far, AccessRules(roots=(str(tmp_path),)), LIMITS)
    assert caught.value.code == "changed"


# ---------------------------------------------------------------------------------------------
# Tables, while they are read
# ---------------------------------------------------------------------------------------------


def box_table(score: float) -> bytes:
    rows = [{"image_uri": f"{at}.png", "boxes": [[0.0, 0.0, 9.0, 9.0]], "scores": [score]} for at in range(9)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


@pytest.mark.parametrize("request_number", [0, 1, 2, 3])
def test_a_table_that_is_replaced_while_it_is_read_refuses_the_job(moto_s3, s3_faults, request_number):
    place = moto_s3.place()
    store = Store(place)
    store.put("boxes.parquet", box_table(0.25))
    access = AccessRules(options={"s3": {"endpoint_url": s3_faults.endpoint}})
    swap = s3_faults.add(
        Fault(
            match="(GET|HEAD) .*boxes.parquet",
            do="reset",
            times=1,
            skip=request_number + 1,
            then=lambda: store.put("boxes.parquet", box_table(0.75)),
        )
    )

    with pytest.raises(JobRefused, match=r"boxes\.parquet: .*(not the version|replaced)"):
        make_plan(InputSettings(boxes=f"{place.uri}/boxes.parquet"), access)

    assert swap.landed == 1


def test_every_range_of_a_table_on_s3_asks_for_its_version(moto_s3, monkeypatch):
    place = moto_s3.place()
    Store(place).put("boxes.parquet", box_table(0.25))
    access = AccessRules(options={"s3": moto_s3.options})
    asked = []
    from hqlabel.pipeline.storage.cloud_buckets import S3Backend

    ask = S3Backend._request

    async def noted(self, method, bucket, key, **kwargs):
        asked.append((method, kwargs.get("Range"), kwargs.get("IfMatch")))
        return await ask(self, method, bucket, key, **kwargs)

    monkeypatch.setattr(S3Backend, "_request", noted)
    read_box_tables([f"{place.uri}/boxes.parquet"], {}, access, folder="")

    ranges = [match for method, span, match in asked if method == "get_object"]
    assert ranges
    assert all(match and match.startswith('"') for match in ranges)


def test_a_local_table_is_one_version_from_the_first_look_to_the_fingerprint(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("a" * 100)
    with one_version_each():
        with open_input(str(path), {}, block=10) as stream:
            assert stream.read(10) == b"a" * 10
            path.write_text("b" * 100)
            with pytest.raises(JobRefused, match=r"boxes\.csv: the file is not the version"):
                stream.read(50)
        with pytest.raises(JobRefused, match=r"boxes\.csv: it was replaced or written to while it was read"):
            open_input(str(path), {})
    with open_input(str(path), {}) as stream:
        assert stream.read() == b"b" * 100, "another plan may well read another version"


def test_label_files_are_of_one_version_when_read_and_when_fingerprinted(tmp_path, monkeypatch):
    from hqlabel.pipeline.planning import plan_summary

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PICTURES["a/1"])
    label = tmp_path / "labels" / "a.txt"
    label.parent.mkdir()
    label.write_text("0 0.5 0.5 0.5 0.5\n")
    fingerprint = plan_summary.fingerprint

    def swapped_before(*given, **named):
        label.write_text("0 0.1 0.1 0.1 0.1\n")
        return fingerprint(*given, **named)

    settings = InputSettings(images=str(tmp_path / "images"), boxes=str(label.parent))
    make_plan(settings)
    monkeypatch.setattr(plan_summary, "fingerprint", swapped_before)
    with pytest.raises(JobRefused, match=r"a\.txt: it was replaced or written to"):
        make_plan(settings)


def test_a_picture_is_not_drawn_from_another_archive_than_its_masks_are_of(tmp_path):
    from hqlabel.jobs.results.render_images import upright_picture
    from hqlabel.pipeline.images.decode_process import DecodeChild
    from tests.pipeline.made_jobs import make_job

    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(sample("a/1")))
    plan = make_plan(InputSettings(images=str(path)))
    row = plan.table.to_pylist()[0]
    image = {"image_uri": row["image_uri"], "source_etag": row["source_version"]}
    made = make_job(tmp_path / "made", {"0.png": PICTURES["a/1"]})
    context = dataclasses.replace(made.context, access=plan.access)
    child = DecodeChild(LIMITS, 64)
    try:
        assert upright_picture(context, image, child).width == 64
        os.utime(path, ns=(1, 1))
        with pytest.raises(ImageError, match="not the version"):
            upright_picture(context, image, child)
    finally:
        child.close()


# ---------------------------------------------------------------------------------------------
# How others write pictures into Parquet
# ---------------------------------------------------------------------------------------------

BYTES = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "fixed": pa.binary(600),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}
PATHS = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
}
WRITTEN = {
    "plain": {"use_dictionary": False},
    "pages": {"data_page_version": "2.0", "compression": "zstd", "data_page_size": 100},
    "sums": {"write_page_checksum": True, "compression": "gzip"},
    "unlabelled": {"store_schema": False},
}


@pytest.mark.parametrize("written", WRITTEN)
def test_pictures_of_every_type_of_bytes_and_text_are_read(tmp_path, written):
    for number, (data, path) in enumerate(itertools.product(BYTES, PATHS)):
        fields = [cast([RED, WHITE, None], BYTES[data]), cast(["0.png", "1.png", None], PATHS[path])]
        table = pa.table({"image": pa.StructArray.from_arrays(fields, names=["bytes", "path"])})
        file = tmp_path / f"{number}.parquet"
        pq.write_table(table, file, **WRITTEN[written])

        plan = make_plan(InputSettings(images=str(file)))

        rows = plan.table.to_pylist()
        assert [row["image_uri"].rpartition("/")[2] for row in rows] == ["0.png", "1.png", ""]
        assert [outcome(row, plan.access) for row in rows] == ["r", "w", "not_found"], (data, path)


def cast(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def test_boxes_next_to_pictures_are_read_whatever_the_type_of_their_lists(tmp_path):
    plain = hf_rows()
    pq.write_table(plain, tmp_path / "plain.parquet")
    large = plain.set_column(1, "objects", plain["objects"].combine_chunks().cast(large_lists()))
    pq.write_table(large, tmp_path / "large.parquet")

    boxes = [
        make_plan(InputSettings(boxes=str(tmp_path / f"{name}.parquet"))).table["boxes"].to_pylist()
        for name in ("plain", "large")
    ]

    assert boxes[0] == boxes[1]


def large_lists() -> pa.DataType:
    numbers = pa.large_list(pa.float64())
    return pa.struct(
        [("bbox", pa.large_list(numbers)), ("category", pa.large_list(pa.int64())), ("score", numbers)]
    )
