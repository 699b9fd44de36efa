"""Pictures inside tars and Parquet files: read by their place, under the rules of the file around them."""

from __future__ import annotations

import io
import os
import tarfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.images.fetch import fetch_ahead, fetch_object
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.planning.plan_table import refused_uris
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage.archive_uris import ParquetRow, TarMember, container_of, parse_archive_uri
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.parquet_pages import GROUP_BYTES
from hqlabel.pipeline.storage.uri_rules import check_uri
from tests.pipeline.made_formats import PICTURES, hf_rows, sample, tar_of

LIMITS = Limits(fetch_timeout_s=10)


def code(uri: str, access: AccessRules, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_object(uri, access, limits)
    return caught.value.code


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        (
            "s3://b/0.tar#1536:99/c/1.jpg",
            TarMember(container="s3://b/0.tar", start=1536, size=99, name="c/1.jpg"),
        ),
        ("/d/0.TAR#512:0/a", TarMember(container="/d/0.TAR", start=512, size=0, name="a")),
        (
            "/d/t.parquet#image:3:12/x.jpg",
            ParquetRow(container="/d/t.parquet", column="image", group=3, row=12, name="x.jpg"),
        ),
        ("/d/t.pq#a-b_C:0:0/", ParquetRow(container="/d/t.pq", column="a-b_C", group=0, row=0)),
        ("a.tar#1:2/b.tar#5:6/c", TarMember(container="a.tar", start=1, size=2, name="b.tar#5:6/c")),
        ("/d/a.tar", None),
        ("/d/a.tar#1:2", None),
        ("/d/a.jpg#1:2/x", None),
        ("/d/t.parquet#im age:1:2/x", None),
        ("/d/t.parquet#image:1:2:3/x", None),
    ],
)
def test_a_uri_names_the_place_and_nothing_else_does(uri, wanted):
    assert parse_archive_uri(uri) == wanted
    assert container_of(uri) == (uri if wanted is None else wanted.container)
    if wanted is not None:
        assert str(wanted) == uri


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_members_and_rows_are_read_whole_from_a_store(kind, tmp_path, request):
    rows, tar = io.BytesIO(), tar_of(sample("a/1") | sample("b/3"))
    pq.write_table(hf_rows(), rows, row_group_size=3)
    if kind == "local":
        store, root = Store(_place(tmp_path)), str(tmp_path / "store")
        access = AccessRules(roots=(root,))
    else:
        moto = request.getfixturevalue("moto_s3")
        store = Store(moto.place())
        root, access = store.place.uri, AccessRules(options={"s3": moto.options})
    store.put("d/0.tar", tar)
    store.put("d/rows.parquet", rows.getvalue())

    for settings in (
        InputSettings(images=f"{root}/d/*.tar"),
        InputSettings(images=f"{root}/d/rows.parquet"),
    ):
        plan = make_plan(settings, access)
        uris = plan.table["image_uri"].to_pylist()
        found = [fetch_object(uri, access, LIMITS) for uri in uris]
        wanted = [PICTURES["a/1"], PICTURES["b/3"]] if "*" in settings.images else list(PICTURES.values())
        assert [one.data for one in found] == wanted
        assert [one.size for one in found] == [len(data) for data in wanted]
        assert [one.fetched.data for one in fetch_ahead(uris, access, LIMITS)] == wanted


def _place(tmp_path):
    from hqlabel.pipeline.job_context import Place

    return Place(uri=str(tmp_path / "store"))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_of_each_kind_of_tar_are_kept(tmp_path, kind):
    deep = "/".join(["ordner"] * 20) + "/bild.png"
    names = ["übung/ñandú.png", "x.png"] if kind == tarfile.USTAR_FORMAT else ["übung/ñandú.png", deep]
    (tmp_path / "a.tar").write_bytes(tar_of(dict.fromkeys(names, PICTURES["a/1"]), kind=kind))

    plan = make_plan(InputSettings(images=str(tmp_path)))

    assert plan.table["image_id"].to_pylist() == sorted(names, key=str.encode)
    for uri in plan.table["image_uri"].to_pylist():
        assert fetch_object(uri, plan.access, LIMITS).data == PICTURES["a/1"]


def test_links_devices_and_folders_of_a_tar_are_never_pictures(tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES["a/2"])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.DIRTYPE),
                           ("c.png", tarfile.CHRTYPE), ("f.png", tarfile.FIFOTYPE)]:  # fmt: skip
            one = tarfile.TarInfo(name)
            one.type, one.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(one)
        for name in ("../../real.png", "m.png", "n.png", "o.png"):
            one = tarfile.TarInfo(name)
            one.size = len(PICTURES["a/1"])
            tar.addfile(one, io.BytesIO(PICTURES["a/1"]))

    plan = make_plan(InputSettings(images=str(tmp_path / "a.tar")))

    ids = plan.table["image_id"].to_pylist()
    assert ids == ["../../real.png", "m.png", "n.png", "o.png"], "a name, never a path"
    assert "4 of 8 members cannot be used as given: left out" in " ".join(plan.summary.warnings)
    assert fetch_object(plan.table["image_uri"][0].as_py(), plan.access, LIMITS).data == PICTURES["a/1"]


def test_the_rules_look_at_the_file_that_holds_the_picture(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.tar").write_bytes(tar_of(sample("a/1")))
    os.symlink(outside / "a.tar", inside / "link.tar")
    access = AccessRules(roots=(str(inside),))
    place = "#1536:60/x.png"

    check_uri(f"{inside}/a.tar{place}", access)
    refused = [
        f"{outside}/a.tar{place}",
        f"{inside}/../out/a.tar{place}",
        f"{inside}/link.tar{place}",
        f"ftp://host/a.tar{place}",
        f"s3://b/../c/a.tar{place}",
        f"{inside}/a.tar{place}\x00",
        f"{outside}/t.parquet#image:0:0/{inside}/x.png",
    ]

    for uri in refused:
        assert code(uri, access) == "uri_refused", uri
    planned = refused_uris(pa.array([f"{inside}/a.tar{place}", *refused], pa.large_string()), access)
    assert sorted(planned) == [1, 2, 4, 5, 6, 7], "links are followed by the worker"


def test_a_tar_that_changed_is_noticed(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"x.png": PICTURES["a/1"], "y.png": PICTURES["a/2"]}))
    plan = make_plan(InputSettings(images=str(tmp_path)))
    first, second = plan.table["image_uri"].to_pylist()

    (tmp_path / "a.tar").write_bytes(tar_of({"0.png": b"other", "x.png": PICTURES["a/1"]}))

    assert {code(first, plan.access), code(second, plan.access)} == {"changed"}
    (tmp_path / "a.tar").unlink()
    assert code(first, plan.access) == "not_found"
    assert code(f"{tmp_path}/a.tar#3:9/x.png", plan.access) == "changed"


def test_limits_hold_for_members_before_they_are_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(sample("a/1")))
    pq.write_table(hf_rows(), tmp_path / "rows.parquet")
    access = AccessRules(roots=(str(tmp_path),))
    small = Limits(max_image_bytes=100, fetch_timeout_s=10)

    assert code(f"{tmp_path}/a.tar#1536:999999999999/x.png", access, small) == "too_many_bytes"
    assert code(f"{tmp_path}/rows.parquet#image:0:0/x.png", access, small) == "too_many_bytes"


def test_rows_that_are_not_there_or_hold_nothing_fail_alone(tmp_path):
    table = pa.table({"image": [{"bytes": None, "path": "elsewhere.png"}, {"bytes": b"x", "path": None}]})
    pq.write_table(table, tmp_path / "rows.parquet")
    access = AccessRules(roots=(str(tmp_path),))
    at = f"{tmp_path}/rows.parquet#image"

    assert fetch_object(f"{at}:0:1/", access, LIMITS).data == b"x"
    assert code(f"{at}:0:0/elsewhere.png", access) == "not_found"
    assert code(f"{at}:0:2/", access) == "changed"
    assert code(f"{at}:1:0/", access) == "changed"
    assert code(f"{tmp_path}/rows.parquet#other:0:0/", access) == "corrupt"
    assert code(f"{tmp_path}/gone.parquet#image:0:0/", access) == "not_found"


def test_damage_in_a_row_group_is_found_by_its_checksum_and_named(tmp_path):
    table = pa.table({"image": [{"bytes": bytes([i]) * 5000, "path": str(i)} for i in range(4)]})
    path = tmp_path / "rows.parquet"
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, row_group_size=2
    )
    body = bytearray(path.read_bytes())
    body[body.index(bytes([1]) * 5000) + 2500] ^= 1
    path.write_bytes(body)
    access = AccessRules(roots=(str(tmp_path),))

    assert code(f"{path}#image:0:1/", access) == "corrupt"
    assert fetch_object(f"{path}#image:1:1/", access, LIMITS).data == bytes([3]) * 5000


def test_a_row_group_is_read_once_for_the_images_of_a_unit(tmp_path, monkeypatch):
    from hqlabel.pipeline.storage import read_archives as contained

    table = pa.table({"image": [{"bytes": bytes([i]) * 100, "path": None} for i in range(64)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=32)
    reads = []
    read = contained.read_pictures
    monkeypatch.setattr(
        contained, "read_pictures", lambda *a, **named: reads.append(named["group"]) or read(*a, **named)
    )
    plan = make_plan(InputSettings(images=str(tmp_path / "rows.parquet")))

    found = list(fetch_ahead(plan.table["image_uri"].to_pylist(), plan.access, LIMITS))

    assert [one.fetched.data for one in found] == [bytes([i]) * 100 for i in range(64)]
    assert sorted(reads) == [0, 1]
    assert GROUP_BYTES >= 2**30


def test_the_headers_of_a_large_tar_are_read_without_its_pictures(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            one = tarfile.TarInfo(f"{number}.png")
            one.size = 2**31
            tar.addfile(one, None)
            tar.fileobj.seek(2**31, io.SEEK_CUR)  # a hole: takes no room
            tar.offset += 2**31
    began = time.monotonic()

    plan = make_plan(InputSettings(images=str(tmp_path)))

    assert plan.summary.images == 3
    assert time.monotonic() - began < 20
