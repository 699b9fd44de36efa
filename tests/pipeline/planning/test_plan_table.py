"""Uris are refused in bulk exactly as one by one; categories are numbered for good."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.plan_table import refused_uris
from hqlabel.pipeline.storage.read_objects import planned_versions
from hqlabel.pipeline.storage.uri_rules import check_uri

FOLDERS = [
    "s3://b/x",
    "s3://b",
    "s3://",
    "gs://b/y/z",
    "http://h/x",
    "http://169.254.169.254/x",
    "ftp://h/x",
    "",
]
PIECES = [
    "a.jpg",
    "b",
    "..",
    ".",
    "ü",
    "x?sig=1",
    "a::b",
    "a#b",
    "a%2e",
    "",
    " ",
    "\x00",
    "\\",
    "user:pw@h",
    "a b",
]


def one_by_one(uris, access):
    found = {}
    for place, uri in enumerate(uris):
        try:
            check_uri(uri, access)
        except ImageError as error:
            found[place] = error.message
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(FOLDERS), st.lists(st.sampled_from(PIECES), max_size=3)), max_size=12)
)
def test_uris_are_refused_in_bulk_as_one_by_one(parts):
    uris = ["/".join([folder, *names]) for folder, names in parts]
    access = AccessRules(schemes=("s3", "gs", "http"))

    assert one_by_one(uris, access) == refused_uris(pa.array(uris, pa.large_string()), access)


def test_local_folders_are_followed_to_where_they_lead(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        for name in ("a.jpg", "b.jpg"):
            (folder / name).touch()
    (inside / "leads_out").symlink_to(outside)
    (inside / "sub" / "0_first.jpg").symlink_to(outside / "a.jpg")
    (inside / "sub" / "folder").mkdir()
    access = AccessRules(roots=(str(inside),))
    uris = [
        f"{inside}/sub/0_first.jpg",
        *(f"{folder}/{name}" for folder in (inside / "sub", inside / "leads_out", outside) for name in "ab"),
        *(
            f"{folder}/{name}.jpg"
            for folder in (inside / "sub", inside / "leads_out", outside)
            for name in "ab"
        ),
        f"{inside}/missing.jpg",
        "/dev/zero",
    ]

    found = refused_uris(pa.array(uris, pa.large_string()), access)

    assert one_by_one(uris, access) == found
    assert 10 == len(found)


def test_a_million_plain_names_cost_one_check_a_folder(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "hqlabel.pipeline.planning.plan_table.check_uri", lambda uri, access: calls.append(uri)
    )
    names = np.char.add("s3://bucket/", np.arange(10_000).astype(str)).astype(object)

    assert {} == refused_uris(
        pa.array([f"{name[:14]}/{name}.jpg" for name in names], pa.large_string()), AccessRules()
    )
    assert len(calls) < 200


def test_what_is_known_of_folders_holds_for_the_next_slice(tmp_path, monkeypatch):
    inside = tmp_path / "in"
    inside.mkdir()
    access, trusted = AccessRules(roots=(str(inside),)), {}
    first = [f"{inside}/{i}.jpg" for i in range(5)] + ["/dev/0.jpg"]
    assert one_by_one(first, access) == refused_uris(pa.array(first, pa.large_string()), access, trusted)
    assert trusted == {f"{inside}/": True, "/dev/": False}
    looked_at = []
    check = check_uri
    monkeypatch.setattr(
        "hqlabel.pipeline.planning.plan_table.check_uri",
        lambda uri, access: (looked_at.append(uri), check(uri, access)),
    )
    second = ["/dev/1.jpg", f"{inside}/6.jpg", "/dev/2.jpg"]

    found = refused_uris(pa.array(second, pa.large_string()), access, trusted)

    assert one_by_one(second, access) == found
    assert looked_at == ["/dev/1.jpg", "/dev/2.jpg"], "a trusted folder is not looked at again"


@pytest.mark.parametrize("uris", [[], [""]])
def test_no_uris_and_blank_ones_are_answered(uris):
    assert len(uris) == len(refused_uris(pa.array(uris, pa.large_string()), AccessRules()))


@pytest.mark.parametrize(
    "error", [ValueError("odd"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), OSError()]
)
def test_whatever_the_rules_raise_on_a_uri_costs_that_row(monkeypatch, error):
    def check(uri, access):
        if "odd" in uri:
            raise error

    monkeypatch.setattr("hqlabel.pipeline.planning.plan_table.check_uri", check)
    uris = pa.array(["/a/1.jpg", "/b/odd.jpg", "/c/2.jpg"], pa.large_string())

    [(row, reason)] = refused_uris(uris, AccessRules()).items()

    assert row == 1
    assert type(error).__name__ in reason


def test_an_archive_that_no_client_takes_is_planned_without_a_version():
    uris = ["s3://my bucket/a.tar", "nowhere://x/a.tar", "http://[::1/a.tar", "/\x00/a.tar"]
    assert planned_versions(uris, lambda uri: {}) == [None] * 4
