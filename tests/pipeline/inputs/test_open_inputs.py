"""Which reader takes what, how relative names are resolved, and which folders are thereby allowed."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.open_inputs import (
    absolute,
    allowed_access,
    read_boxes,
    read_images,
    resolve_uris,
)
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import InputSettings


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("a.jpg", "/data/a.jpg"),
        ("./a.jpg", "/data/a.jpg"),
        (".//./x/a.jpg", "/data/x/a.jpg"),
        ("../a.jpg", "/data/../a.jpg"),
        ("a:b.jpg", "/data/a:b.jpg"),
        ("a%20b ü.jpg", "/data/a%20b ü.jpg"),
        ("..a.jpg", "/data/..a.jpg"),
        ("/a.jpg", "/a.jpg"),
        ("file:///a.jpg", "file:///a.jpg"),
        ("s3://b/a.jpg", "s3://b/a.jpg"),
        ("S3://b/a.jpg", "S3://b/a.jpg"),
        ("simplecache::s3://b/a.jpg", "simplecache::s3://b/a.jpg"),
        ("data:image/png;base64,xx", "data:image/png;base64,xx"),
        ("", ""),
        (" ", " "),
    ],
)
@pytest.mark.parametrize("folder", ["/data", "/data/"])
def test_relative_uris_start_from_the_folder_and_others_are_left_alone(uri, resolved, folder):
    assert [resolved] == resolve_uris(pa.array([uri], pa.large_string()), folder).to_pylist()


def test_the_root_of_the_disk_is_a_folder_too():
    assert ["/a.jpg"] == resolve_uris(pa.array(["a.jpg"], pa.large_string()), "/").to_pylist()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b/", "/a/b"),
        ("/a/../b", "/b"),
        ("file:///a", "/a"),
        ("s3://b/x//", "s3://b/x"),
        ("s3://b", "s3://b"),
    ],
)
def test_inputs_are_named_absolutely(given, expected):
    assert expected == absolute(given)


def roots(**settings) -> tuple[str, ...]:
    return allowed_access(InputSettings(**settings)).roots


def test_the_inputs_imply_the_folders_that_may_be_read(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    (tmp_path / "spark.parquet").mkdir()
    here = os.path.realpath(tmp_path)

    assert (f"{here}/pictures",) == roots(images=f"{tmp_path}/link", boxes="/elsewhere/b.json")
    assert (f"{here}/pictures",) == roots(images=f"{tmp_path}/pictures/*.jpg")
    assert (here,) == roots(images=f"{tmp_path}/i.csv")
    assert (here,) == roots(boxes=f"{tmp_path}/b.json")
    assert (f"{here}/spark.parquet",) == roots(boxes=f"{tmp_path}/spark.parquet")
    assert (f"{here}/pictures", here) == roots(images=f"{tmp_path}/i.json", image_root=f"{tmp_path}/pictures")
    assert () == roots(images="s3://bucket/x")


def test_rules_given_by_a_person_stay():
    access = AccessRules(roots=("/",), schemes=("https",), options={"s3": {"anon": True}})

    found = allowed_access(InputSettings(images="s3://b/x"), access)

    assert access == found


def test_a_folder_of_tables_of_several_kinds_is_refused(tmp_path):
    pq.write_table(pa.table({"image_uri": ["a"], "bbox": [[1.0]]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("image_uri,x1,y1,x2,y2\na,1,2,3,4\n")

    with pytest.raises(JobRefused, match=r"several kinds: 1 parquet .* 1 csv"):
        read_boxes(InputSettings(boxes=str(tmp_path)), AccessRules())


@pytest.mark.parametrize("name", ["b.parquet", "b.csv", "b.jsonl", "b.json", "nothing"])
def test_a_missing_box_file_is_named(tmp_path, name):
    with pytest.raises(JobRefused, match=name):
        read_boxes(InputSettings(boxes=str(tmp_path / name)), AccessRules())


def test_boxes_in_a_folder_of_pictures_are_not_looked_for(tmp_path):
    (tmp_path / "a.jpg").touch()

    with pytest.raises(JobRefused, match="no pictures or tables"):
        read_boxes(InputSettings(boxes=str(tmp_path)), AccessRules())


def test_endings_are_read_in_any_case(tmp_path):
    for name in ("a.JPG", "b.Jpeg", "c.TIFF"):
        (tmp_path / name).touch()

    assert 3 == len(read_images(InputSettings(images=str(tmp_path)), AccessRules()).image_uri)
