"""Broken bytes in the formats that are read in this process: a plan, or a refusal; never anything else."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from tests.pipeline.made_formats import FORMATS, PICTURES, sample, tar_of

FILES = {"yolo": "labels/b/3.txt", "megadetector": "md.json", "tars": "shards/1.tar"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("formats")
    return {kind: (root / kind, FORMATS[kind](root / kind)) for kind in FILES}


def mutated(draw: st.DrawFn, body: bytes) -> bytes:
    """Some bytes replaced, cut out or put in."""
    found = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        kind = draw(st.sampled_from(["replace", "cut", "insert", "end"]))
        if kind == "replace":
            found[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "cut":
            del found[at : at + draw(st.integers(1, 600))]
        elif kind == "insert":
            found[at:at] = draw(st.sampled_from([b"\0" * 512, b"-", b"9" * 20, b"nan ", b'"', b"}", b"\xff"]))
        else:
            del found[at:]
    return bytes(found)


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_planned_or_refused(kind, folders, data):
    folder, written = folders[kind]
    path = folder / FILES[kind]
    if not (folder / "kept").exists():
        shutil.copy(path, folder / "kept")
    path.write_bytes(mutated(data.draw, (folder / "kept").read_bytes()))

    try:
        images, said = make_plan(written.settings).summary.images, str(folder)
    except JobRefused as refusal:
        images, said = 4, str(refusal)

    assert images >= 2
    assert str(folder) in said


@settings(max_examples=60)
@given(start=st.integers(0, 2**40), size=st.integers(0, 2**40), name=st.text(min_size=1, max_size=20))
def test_any_place_in_a_tar_gives_a_picture_or_an_outcome(tmp_path_factory, start, size, name):
    folder = tmp_path_factory.getbasetemp() / "places"
    folder.mkdir(exist_ok=True)
    tar = folder / "a.tar"
    if not tar.exists():
        tar.write_bytes(tar_of(sample("a/1")))
    access, limits = AccessRules(roots=(str(folder),)), Limits(fetch_timeout_s=5, max_image_bytes=10**6)

    try:
        found = fetch_object(f"{tar}#{start}:{size}/{name}", access, limits).data
    except ImageError as error:
        found = error.code

    codes = ("changed", "too_many_bytes", "uri_refused", "not_found", "unreachable")
    assert found in (*codes, *PICTURES.values(), *sample("a/1").values())


def test_the_unchanged_files_are_planned(folders):
    for folder, written in folders.values():
        kept = folder / "kept"
        if kept.exists():
            shutil.copy(kept, folder / FILES[folder.name])
        assert make_plan(written.settings).summary.images == 4
        assert isinstance(written.settings, InputSettings)
