"""Folders as systems and programs make them: what is left out, where links lead, what is refused."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import os
import re
import shlex
import shutil
import socket
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.inputs.find_files import pointed_at
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, write_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage.list_folders import Pattern, allow_root
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import list_inputs
from tests.hub_server import REPOSITORY, hub_server
from tests.pipeline.made_formats import PICTURES, hf_rows, sample, tar_of
from tests.pipeline.made_units import make_job

PICTURE = PICTURES["a/1"]
LIMITS = Limits(fetch_timeout_s=10)


def put(root: Path, *names: str, data: bytes = PICTURE) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def planned(images: object, *, boxes: object = None, roots: tuple[object, ...] = (), **more: object) -> Plan:
    access = AccessRules(roots=tuple(map(str, roots)), options=more.pop("options", {}))
    boxes = None if boxes is None else str(boxes)
    return make_plan(InputSettings(images=str(images), boxes=boxes, **more), access)


def ids(plan: Plan) -> list[str]:
    return plan.table["image_id"].to_pylist()


def refusal(images: object, **more: object) -> str:
    with pytest.raises(JobRefused) as caught:
        planned(images, **more)
    return str(caught.value)


def codes(plan: Plan) -> dict[str, str]:
    """image_id -> `read`, or why not, as a worker finds it."""
    found = {}
    for row in plan.table.to_pylist():
        try:
            data = fetch_object(row["image_uri"], plan.access, LIMITS).data
            found[row["image_id"]] = "read" if data == PICTURE else "another picture"
        except ImageError as error:
            found[row["image_id"]] = error.code
    return found


def named_roots(text: str) -> tuple[str, ...]:
    """The folders of the flags in a message, as a shell would hand them over."""
    words = shlex.split(text[text.index("--allow-root") :].partition(", or take")[0])
    return tuple(word for flag, word in itertools.pairwise(words) if flag == "--allow-root")


# ---------------------------------------------------------------------------------------------
# Left out by name
# ---------------------------------------------------------------------------------------------

FOLDERS = [
    ".ipynb_checkpoints", ".thumbnails", ".git", ".Trash-1000", ".Spotlight-V100", ".@__thumb",
    ".picasaoriginals",
    "@eaDir", "#recycle", "#snapshot", "@Recycle", "@tmp", "__MACOSX", "lost+found", "$RECYCLE.BIN",
    "$Recycle.Bin", "System Volume Information", "__pycache__", "sub/.thumbnails", "sub/@eaDir",
]  # fmt: skip
FILES = ["._a.jpg", ".a.jpg", ".DS_Store", "sub/._b.JPG"]
KEPT = [
    "_MG_1234.JPG",
    "__a.jpg",
    "@home/a.jpg",
    "#1.jpg",
    "~a.jpg",
    "$x/a.jpg",
    "lost and found/a.jpg",
    "a..jpg",
]


def test_what_systems_and_programs_keep_beside_pictures_is_left_out_and_counted(tmp_path):
    inside = [f"{folder}/SYNOPHOTO_THUMB_M.jpg" for folder in FOLDERS]
    put(tmp_path, *inside, *FILES, *KEPT, "Thumbs.db", "desktop.ini", "sub/@eaDir/b.jpg/SYNOFILE_THUMB_M.png")

    plan = planned(tmp_path)

    assert sorted(KEPT) == ids(plan)
    assert 2 == plan.summary.skipped_files
    folders, files = plan.summary.left_out
    assert folders.startswith(f"{len(FOLDERS)} hidden folders (")
    assert files == f"{len(FILES)} hidden files in {tmp_path}: left out"


def test_the_output_of_a_job_among_the_pictures_is_left_out_and_is_one_when_pointed_at(tmp_path):
    root = put(tmp_path / "photos", "a.jpg", "job.json", "other/job.json", "other/b.jpg")
    made = make_job(Store(Place(uri=str(root / "out"))))
    made.commit()
    put(root, "out/report/contact_sheet.png")
    write_plan(made.store, planned(root / "a.jpg"))
    assert list((root / "out" / "plan").rglob("*.parquet"))

    plan = planned(root)

    assert ["a.jpg", "other/b.jpg"] == ids(plan)
    assert f"outputs of hqlabel among the files: 1, such as {root}/out/: left out" in plan.summary.left_out
    assert "an output without published tables" in refusal(root / "out")


@pytest.mark.parametrize("folder", FOLDERS)
def test_whoever_points_at_a_hidden_folder_means_it(tmp_path, folder):
    put(tmp_path, f"{folder}/a.jpg", f"{folder}/deep/b.jpg", f"{folder}/.thumbnails/c.jpg")

    assert ["a.jpg", "deep/b.jpg"] == ids(planned(tmp_path / folder))
    assert ["b.jpg"] == ids(planned(tmp_path / folder / "deep"))
    assert ["a.jpg"] == ids(planned(f"{tmp_path}/{glob.escape(folder)}/*.jpg"))
    assert ["a.jpg"] == ids(planned(tmp_path / folder / "a.jpg"))


def test_keys_of_a_bucket_are_left_out_likewise(moto_s3):
    place = moto_s3.place()
    store = Store(place)
    for name in (
        *(f"photos/{folder}/t.jpg" for folder in FOLDERS),
        *(f"photos/{name}" for name in (*FILES, *KEPT)),
    ):
        store.put(name, PICTURE)
    options = {"s3": moto_s3.options}

    plan = planned(f"{place.uri}/photos", options=options)

    assert sorted(KEPT) == ids(plan)
    assert f"{len(FOLDERS)} hidden folders (" in plan.summary.left_out[0]
    assert f"{len(FILES)} hidden files" in plan.summary.left_out[1]
    assert ["t.jpg"] == ids(planned(f"{place.uri}/photos/.ipynb_checkpoints", options=options))
    below = planned(f"{place.uri}/photos/**/*.[jJ][pP][gG]", options=options)
    assert sorted(KEPT) == ids(below)
    assert ["sub/.thumbnails/t.jpg"] == ids(planned(f"{place.uri}/photos/*/.thumb*/*.jpg", options=options))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a.jpg", "sub/b.jpg"]),
        ("*/*.jpg", ["sub/b.jpg"]),
        (".thumbnails/*.jpg", ["t.jpg"]),
        ("**/.thumbnails/*.jpg", [".thumbnails/t.jpg", "sub/.thumbnails/t.jpg"]),
        ("**/@eaDir/**/*.jpg", ["sub/@eaDir/b.jpg/s.jpg"]),
        (".*.jpg", ["._a.jpg"]),
    ],
)
def test_a_pattern_takes_hidden_names_only_where_it_names_them(tmp_path, pattern, found):
    put(tmp_path, "a.jpg", "sub/b.jpg", "._a.jpg", ".thumbnails/t.jpg", "sub/.thumbnails/t.jpg")
    put(tmp_path, "sub/@eaDir/b.jpg/s.jpg")

    assert found == ids(planned(f"{tmp_path}/{pattern}"))


NAMES = ["a", "b1", ".h", "x.jpg", ".y.jpg", "c.d"]
PARTS = ["*", "?", "a", "*.jpg", "**", ".h", ".*", "[ab]*", "[.]h", "*1", "c.?"]


@settings(max_examples=200, deadline=None)
@given(
    paths=st.sets(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join), max_size=8),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=3),
)
def test_patterns_mean_what_they_mean_to_pythons_glob(paths, parts):
    files = {path for path in paths if not any(other.startswith(path + "/") for other in paths)}
    pattern = "/".join([*parts, "*"] if parts[-1] == "**" else parts)
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), *files, data=b"")
        wanted = glob.glob(pattern, root_dir=folder, recursive=True)

        entries = list_inputs(folder, {}, pattern=pattern).entries

    found = [entry.key.removeprefix(f"{folder}/") for entry in entries]
    assert sorted({path for path in wanted if path in files}) == found


def test_a_pattern_looks_at_no_folder_that_cannot_hold_a_match(tmp_path):
    put(tmp_path, "a.jpg", "deep/b.jpg", "2024/c.jpg")
    (tmp_path / "out").symlink_to("/usr")

    assert ["a.jpg"] == ids(planned(f"{tmp_path}/*.jpg"))
    assert ["2024/c.jpg"] == ids(planned(f"{tmp_path}/20*/*.jpg"))
    assert Pattern("a/**/x").may_hold("a/b/c")
    assert not Pattern("a/**/x").may_hold("b")
    assert not Pattern("a/*").may_hold("a/b")


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt", "tar"])
def test_tables_labels_and_tars_in_hidden_folders_are_left_out_likewise(tmp_path, ending):
    photos, folder = put(tmp_path / "photos", "a.png"), tmp_path / "boxes"
    bodies = {
        "txt": b"0 0.5 0.5 0.2 0.2\n",
        "jsonl": b'{"image_uri": "a.png", "boxes": [[1, 2, 3, 4]]}\n',
        "tar": tar_of(sample("a/1")),
    }
    if ending == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image_uri": ["a.png"], "boxes": [[[1.0, 2.0, 3.0, 4.0]]]}), sink)
        bodies["parquet"] = sink.getvalue().to_pybytes()
    good, hidden = f"a.{ending}", f".ipynb_checkpoints/a-checkpoint.{ending}"
    put(folder, good, data=bodies[ending])
    put(folder, hidden, f"@eaDir/a.{ending}/x.{ending}", f"._a.{ending}", data=b"\x00\x05\x16\x07 no table")
    before = list_inputs(str(folder), {}).entries

    inputs = {"boxes": str(folder)} | ({} if ending == "tar" else {"images": str(photos)})
    plan = make_plan(InputSettings(**inputs))

    assert [f"{folder}/{good}"] == [entry.key for entry in before]
    assert 1 == plan.table.num_rows
    assert plan.summary.boxes > 0
    if ending != "tar":
        assert any("2 hidden folders (" in line for line in plan.summary.warnings), plan.summary.warnings


def test_hidden_pictures_of_a_tar_are_left_out_likewise(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (
            "./a.png",
            "./sub/b.png",
            "./._a.png",
            ".ipynb_checkpoints/c.png",
            "__MACOSX/d.png",
            "../e.png",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(PICTURE)
            tar.addfile(member, io.BytesIO(PICTURE))

    plan = planned(tmp_path / "a.tar")

    assert ["../e.png", "./a.png", "./sub/b.png"] == ids(plan)
    assert ("hidden pictures in the tars: 3, left out",) == plan.summary.left_out


# ---------------------------------------------------------------------------------------------
# Links that stay inside, or that were pointed at
# ---------------------------------------------------------------------------------------------


def test_links_that_stay_inside_are_followed_each_folder_once(tmp_path):
    root = put(tmp_path / "photos", "2024/a.jpg", "2024/deep/b.jpg", "real/c.jpg", ".cache/d.jpg")
    (root / "latest").symlink_to("2024")  # listed already under its own name
    (root / "linked.jpg").symlink_to("real/c.jpg")
    (root / "hidden-but-named").symlink_to(".cache")
    (root / "hidden-again").symlink_to(root / ".cache")

    plan = planned(root)

    wanted = ["2024/a.jpg", "2024/deep/b.jpg", "hidden-again/d.jpg", "linked.jpg", "real/c.jpg"]
    assert wanted == ids(plan)
    assert {"read"} == set(codes(plan).values())
    assert (
        f"2 links to folders that are listed already, such as {root}/hidden-but-named: left out"
        in plan.summary.left_out
    )
    assert ["a.jpg", "deep/b.jpg"] == ids(planned(root / "latest")), "whoever points at a link means it"
    assert ["a.jpg"] == ids(planned(f"{root}/latest/*.jpg"))


def test_circles_of_links_end(tmp_path):
    root = put(tmp_path / "photos", "a/1.jpg", "b/2.jpg")
    (root / "self").symlink_to(".")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "to-b").symlink_to("../b")
    (root / "b" / "to-a").symlink_to("../a")
    (root / "ring").symlink_to("gnir")
    (root / "gnir").symlink_to("ring")
    (root / "loop.jpg").symlink_to("loop.jpg")

    plan = planned(root)

    assert {"a/1.jpg": "read", "b/2.jpg": "read", "loop.jpg": "uri_refused"} == codes(plan)
    assert any(
        line.startswith("4 links to folders that are listed already") for line in plan.summary.left_out
    )
    assert 2 == plan.summary.skipped_files, "the ring is no picture"


def test_dense_links_between_folders_cost_no_more_than_the_folders(tmp_path):
    names = [f"d{number}" for number in range(12)]
    for name in names:
        put(tmp_path, f"{name}/{name}.jpg")
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")

    assert [f"{name}/{name}.jpg" for name in sorted(names)] == ids(planned(tmp_path))


def test_a_linked_folder_is_followed_when_it_was_pointed_at_or_allowed(tmp_path):
    elsewhere = put(tmp_path / "disk2" / "cats", "a.jpg", "deep/b.jpg").resolve()
    root = put(tmp_path / "photos", "c.jpg")
    (root / "cats").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(root)

    for images in (root, tmp_path / "link"):
        text = refusal(images)
        assert f"{images}/cats is a link to {elsewhere}" in text
        plan = planned(images, roots=named_roots(text))
        assert {"c.jpg": "read", "cats/a.jpg": "read", "cats/deep/b.jpg": "read"} == codes(plan)
    assert ["a.jpg", "deep/b.jpg"] == ids(planned(root / "cats"))
    assert ["c.jpg"] == ids(planned(f"{root}/*.jpg"))


def test_a_dangling_link_is_a_row_where_it_is_called_like_a_picture(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "gone").symlink_to("nowhere")

    plan = planned(tmp_path)

    assert {"a.jpg": "read", "gone.jpg": "not_found"} == codes(plan)
    assert 1 == plan.summary.skipped_files


def test_links_to_what_is_gone_elsewhere_are_said_and_no_flag_is_asked_for(tmp_path):
    # A data set whose disk is not mounted, or whose files git-annex or DVC have not fetched.
    old = tmp_path / "unmounted"
    root = put(tmp_path / "photos", "a.jpg")
    for name in ("1.jpg", "2.jpg", "more"):
        (root / name).symlink_to(old / name)

    plan = planned(root)

    assert {"a.jpg": "read", "1.jpg": "not_found", "2.jpg": "not_found"} == codes(plan)
    assert 0 == plan.summary.refused_uris
    (line,) = [line for line in plan.summary.left_out if "not there" in line]
    assert f"3 links to what is not there, such as {root}/1.jpg, a link to {old}/1.jpg" == line
    with pytest.raises(ImageError, match="where there is nothing"):
        fetch_object(f"{root}/1.jpg", plan.access, LIMITS)


def test_whether_a_file_outside_is_there_is_not_told_but_of_links_inside(tmp_path):
    root = put(tmp_path / "photos", "a.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    access = AccessRules(roots=(str(root.resolve()),))

    for name in ("gone.jpg", "link.jpg"):
        with pytest.raises(ImageError) as caught:
            fetch_object(f"{root}/../{name}", access, LIMITS)
        assert "uri_refused" == caught.value.code


# ---------------------------------------------------------------------------------------------
# Links that leave
# ---------------------------------------------------------------------------------------------


def farm(tmp_path: Path, count: int, *, own: int = 0) -> tuple[Path, Path]:
    """A folder of `count` links to pictures elsewhere, in two sub-folders, and `own` pictures."""
    store = put(tmp_path / "store", *(f"{i % 2}/{i}.jpg" for i in range(count))).resolve()
    root = put(tmp_path / "photos", *(f"own{i}.jpg" for i in range(own)))
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"{i}.jpg").symlink_to(store / str(i % 2) / f"{i}.jpg")
    return root, store


@pytest.mark.parametrize("own", [0, 3])
def test_a_folder_of_links_to_elsewhere_is_refused_before_work_with_the_flag_that_allows_it(tmp_path, own):
    root, store = farm(tmp_path, 4, own=own)

    text = refusal(root)

    assert text.startswith(f"4 of {4 + own} images lie outside what may be read, such as {root}/0.jpg")
    assert (str(store),) == named_roots(text), "the nearest folder above all of them"
    assert {"read"} == set(codes(planned(root, roots=named_roots(text))).values())


def test_a_few_links_that_leave_are_rows_and_said(tmp_path):
    root, store = farm(tmp_path, 3, own=3)

    plan = planned(root)

    refused = {f"{i}.jpg": "uri_refused" for i in range(3)}
    assert refused | {f"own{i}.jpg": "read" for i in range(3)} == codes(plan)
    assert 3 == plan.summary.refused_uris
    assert any("--allow-root" in line and f"{store}/0" in line for line in plan.summary.warnings)


def test_links_behind_the_first_of_a_folder_are_found_when_planning(tmp_path):
    root, _ = farm(tmp_path, 1, own=0)
    put(root, "!first.jpg", "!second.jpg")

    assert {"!first.jpg": None, "!second.jpg": None, "0.jpg": "uri_refused"} == {
        row["image_id"]: row["error_code"] for row in planned(root).table.to_pylist()
    }


def test_a_table_of_pictures_elsewhere_is_refused_with_the_flag_and_so_are_schemes(tmp_path):
    _, store = farm(tmp_path, 4)
    table = tmp_path / "lists" / "i.csv"
    table.parent.mkdir()
    table.write_text("image_uri\n" + "".join(f"{store}/{i % 2}/{i}.jpg\n" for i in range(4)))

    text = refusal(table)

    assert (str(store),) == named_roots(text)
    assert {"read"} == set(codes(planned(table, roots=named_roots(text))).values())
    table.write_text("image_uri\nhttps://me:word@host/a.jpg?token=x\nhttps://host/b.jpg\n")
    text = refusal(table)
    assert "allow them with --allow-scheme https" in text
    assert "word" not in text


def test_folders_that_share_no_parent_are_named_one_by_one():
    assert "--allow-root /data/x" == allow_root(["/data/x", "/data/x"])
    assert "--allow-root /data" == allow_root(["/data/x", "/data/y"])
    assert "--allow-root /a/x --allow-root /b/y" == allow_root(["/b/y", "/a/x"])
    assert "--allow-root '/a b'" == allow_root(["/a b"])


@pytest.mark.parametrize("ending", ["jsonl", "txt", "tar"])
def test_linked_tables_labels_and_tars_that_leave_are_refused_and_named_ones_are_read(tmp_path, ending):
    bodies = {
        "txt": b"0 0.5 0.5 0.2 0.2\n",
        "jsonl": b'{"image_uri": "1.png", "boxes": [[1, 2, 3, 4]]}\n',
        "tar": tar_of(sample("a/1")),
    }
    store = put(tmp_path / "store", f"1.{ending}", data=bodies[ending]).resolve()
    photos, folder = put(tmp_path / "photos", "1.png"), tmp_path / "boxes"
    folder.mkdir()
    (folder / f"1.{ending}").symlink_to(store / f"1.{ending}")
    images = None if ending == "tar" else str(photos)

    with pytest.raises(JobRefused) as caught:
        make_plan(InputSettings(images=images, boxes=str(folder)))
    assert f"{folder}/1.{ending} is a link to {store}/1.{ending}" in str(caught.value)

    roots = named_roots(str(caught.value))
    plan = make_plan(InputSettings(images=images, boxes=str(folder)), AccessRules(roots=roots))
    assert plan.summary.boxes > 0
    assert {"read"} == set(codes(plan).values())
    if ending != "txt":
        plan = make_plan(InputSettings(images=images, boxes=str(folder / f"1.{ending}")))
        assert {"read"} == set(codes(plan).values()), "whoever points at a link means it"


# ---------------------------------------------------------------------------------------------
# The cache of Hugging Face's hub
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """A folder with a data set that huggingface_hub itself has downloaded; and the snapshot in it."""
    rows = pa.BufferOutputStream()
    pq.write_table(hf_rows(), rows, row_group_size=2)
    files = {"train/a.png": PICTURE, "train/deep/b.png": PICTURE, "README.md": b"x"}
    files |= {"rows/train-0.parquet": rows.getvalue().to_pybytes(), "tars/0.tar": tar_of(sample("a/1"))}
    files |= {"lists/i.csv": b"image_uri\n../train/a.png\n"}
    cache = tmp_path_factory.mktemp("home") / ".cache" / "huggingface" / "hub"
    with pytest.MonkeyPatch.context() as patch, hub_server(files) as hub:
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        snapshot = snapshot_download(
            REPOSITORY, repo_type="dataset", endpoint=hub.endpoint, cache_dir=cache, max_workers=1
        )
    assert os.path.islink(f"{snapshot}/train/a.png")
    assert os.readlink(f"{snapshot}/train/a.png").startswith("../../../blobs/")
    return cache, Path(snapshot)


@pytest.mark.parametrize(
    ("place", "wanted"),
    [("", ["train/a.png", "train/deep/b.png"]), ("/train", ["a.png", "deep/b.png"]),
     ("/train/a.png", ["a.png"]),
     ("/**/*.png", ["train/a.png", "train/deep/b.png"]), ("/rows", None), ("/rows/train-0.parquet", None),
     ("/tars", ["a/1.png"]), ("/tars/0.tar", ["a/1.png"])],
)  # fmt: skip
def test_a_snapshot_of_the_hubs_cache_is_read_where_its_links_lead(hub_cache, place, wanted):
    _, snapshot = hub_cache

    plan = planned(f"{snapshot}{place}")

    assert wanted is None or wanted == ids(plan)
    assert plan.table.num_rows > 0
    assert not set(codes(plan).values()) & {"uri_refused", "not_found"}


def test_the_cache_above_a_snapshot_holds_each_picture_once_and_blobs_are_no_news(hub_cache):
    cache, snapshot = hub_cache
    images = cache / f"datasets--{REPOSITORY.replace('/', '--')}"

    plan = planned(images / "snapshots" / snapshot.name / "train")
    assert {"a.png": "read", "deep/b.png": "read"} == codes(plan)

    plan = planned(images)
    assert {f"snapshots/{snapshot.name}/train/{name}": "read" for name in ("a.png", "deep/b.png")} == codes(
        plan
    )
    assert not any("by their first bytes" in line for line in plan.summary.warnings)


def test_blobs_that_lead_away_are_not_believed(tmp_path):
    secret = put(tmp_path / "secret", "s.jpg").resolve()
    repository = tmp_path / "datasets--owner--evil"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.jpg").symlink_to("../../blobs/s.jpg")
    (repository / "blobs").symlink_to(secret)
    assert [os.path.realpath(snapshot)] == pointed_at(str(snapshot))
    assert (str(secret),) == named_roots(refusal(snapshot))

    (repository / "blobs").unlink()
    (repository / "blobs").mkdir()
    assert [os.path.realpath(snapshot), os.path.realpath(repository / "blobs")] == pointed_at(str(snapshot))
    (repository / "blobs" / "s.jpg").symlink_to(secret / "s.jpg")
    assert (str(secret),) == named_roots(refusal(snapshot))


# ---------------------------------------------------------------------------------------------
# What cannot be read or named
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody():
    """Not root for the block, whom no mode stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="hqlabel-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_closed_sub_folder_is_refused_by_name_and_a_pattern_goes_around_it(open_folder):
    put(open_folder, "a.jpg", "closed/b.jpg", "lost+found/c.jpg", "open/d.jpg")
    for name in ("closed", "lost+found"):
        (open_folder / name).chmod(0o000)

    with as_nobody():
        text = refusal(open_folder)
        found = [ids(planned(f"{open_folder}/{pattern}")) for pattern in ("*.jpg", "o*/*.jpg")]

    assert f"{open_folder}/closed: this folder cannot be read (Permission denied)" in text
    assert "lost+found" not in text
    assert [["a.jpg"], ["open/d.jpg"]] == found
    (open_folder / "closed").chmod(0o755)
    with as_nobody():
        assert ["a.jpg", "closed/b.jpg", "open/d.jpg"] == ids(planned(open_folder)), "lost+found is no loss"


@pytest.mark.timeout(60)
def test_pipes_sockets_and_devices_are_rows_and_nobody_waits_for_them(tmp_path):
    put(tmp_path, *(f"{i}.jpg" for i in range(4)))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path):
        listener.bind("socket.jpg")
        plan = planned(tmp_path)

        odd = dict.fromkeys(("pipe.jpg", "device.jpg", "socket.jpg"), "uri_refused")
        assert odd | {f"{i}.jpg": "read" for i in range(4)} == codes(plan)
    assert 3 == plan.summary.refused_uris, "said before work"
    for name in ("pipe.jpg", "pipe.json", "pipe.csv", "pipe.tar", "pipe"):
        if name != "pipe.jpg":
            os.mkfifo(tmp_path / name)
        assert "this is a named pipe, not a file" in refusal(tmp_path / name), name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.tar"])
def test_a_pipe_called_like_a_table_is_refused_as_what_it_is(tmp_path, name):
    photos, boxes = put(tmp_path / "photos", "a.jpg"), tmp_path / "boxes"
    boxes.mkdir()
    os.mkfifo(boxes / name)

    with pytest.raises(JobRefused, match=r"this is a named pipe, not a file"):
        make_plan(InputSettings(images=None if name == "a.tar" else str(photos), boxes=str(boxes)))


def test_names_that_are_not_utf8_are_said(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.doc")).touch()
    plan = planned(tmp_path)
    assert ["a.jpg"] == ids(plan)
    assert "1 other files with names that are not UTF-8: left out" in plan.summary.left_out

    put(tmp_path, os.fsdecode(b"caf\xe9/b.jpg"))
    plan = planned(tmp_path)
    assert {"a.jpg": None, r"caf\udce9/b.jpg": "uri_refused"} == dict(
        zip(ids(plan), plan.table.column("error_code").to_pylist(), strict=True)
    )
    assert "not UTF-8" in plan.table.column("error_message")[1].as_py()
    assert any(r"caf\udce9/b.jpg': a row that fails" in told for told in plan.summary.left_out)

    put(tmp_path, os.fsdecode(b"caf\xe9/c.jpg"))
    text = refusal(tmp_path)
    assert "not UTF-8" in text
    assert r"caf\udce9/b.jpg" in text
    assert text.isprintable()
    for name in (b"caf\xe9", b"caf\xe9/b.jpg", b"caf\xe9/*.jpg"):
        assert r"caf\udce9" in refusal(tmp_path / os.fsdecode(name))


def test_hidden_names_that_are_not_utf8_can_be_written_down(tmp_path):
    put(tmp_path, "a.jpg", os.fsdecode(b".caf\xe9/b.jpg"), os.fsdecode(b".\xe9.jpg"))
    (tmp_path / os.fsdecode(b"l\xe9")).symlink_to(".")

    plan = planned(tmp_path)

    assert ["a.jpg"] == ids(plan)
    assert 3 == len(plan.summary.left_out)
    assert all(line.isprintable() for line in plan.summary.left_out)


NAMES_OF_PICTURES = [
    "a.JPG", "A.JPG", "a.jpg", "b.JPEG", "c.jpe", "d.jfif", "new\nline.jpg", "esc\x1b[31m.jpg", "#.jpg",
    "?.jpg",
    "%20.jpg", "a%2Fb.jpg", "a#1:2.jpg", "x.tar#1:2.jpg", "é.jpg", "e\u0301.jpg", " .jpg", "a b.jpg",
    "::.jpg", "s3:.jpg", "x" * 251 + ".jpg", "$(x).jpg", "'.jpg", "-.jpg", "*.jpg", "[a].jpg", "\u202e.jpg",
    "sub.jpg/x.png",
]  # fmt: skip


def test_names_are_bytes(tmp_path, moto_s3):
    put(tmp_path, *NAMES_OF_PICTURES)
    assert dict.fromkeys(NAMES_OF_PICTURES, "read") == codes(planned(tmp_path))
    place = moto_s3.place()
    keys = [name for name in NAMES_OF_PICTURES if name.isprintable() or not name.isascii()]  # moto's limit
    for name in keys:
        Store(place).put(f"p/{name}", PICTURE)

    plan = planned(f"{place.uri}/p", options={"s3": moto_s3.options})

    assert dict.fromkeys(keys, "read") == codes(plan)


# ---------------------------------------------------------------------------------------------
# One picture, and pictures by content alone
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", ".hidden.png", "a b#?.webp"])
def test_one_picture_is_an_input(tmp_path, name):
    put(tmp_path, f"photos/{name}", "photos/other.jpg", "secret.jpg")
    (tmp_path / "boxes.jsonl").write_text(f'{{"image_uri": "{name}", "boxes": [[1, 2, 3, 4]]}}\n')

    plan = planned(tmp_path / "photos" / name, boxes=tmp_path / "boxes.jsonl")

    assert {name: "read"} == codes(plan)
    assert 1 == plan.summary.boxes
    assert (os.path.realpath(tmp_path / "photos" / name),) == plan.access.roots, (
        "its neighbours are not meant"
    )


def test_one_picture_of_a_bucket_and_one_behind_a_link(tmp_path, moto_s3):
    place = moto_s3.place()
    Store(place).put("p/A.JPG", PICTURE)
    assert {"A.JPG": "read"} == codes(planned(f"{place.uri}/p/A.JPG", options={"s3": moto_s3.options}))
    put(tmp_path, "store/0123")
    (tmp_path / "a.jpg").symlink_to("store/0123")
    assert {"a.jpg": "read"} == codes(planned(tmp_path / "a.jpg"))
    put(tmp_path, "folder.jpg/b.jpg")
    assert {"b.jpg": "read"} == codes(planned(tmp_path / "folder.jpg"))


def test_one_file_without_a_pictures_ending_goes_by_its_first_bytes(tmp_path, moto_s3):
    place = moto_s3.place()
    put(tmp_path, "IMG0001")
    put(tmp_path, "notes.txt", data=b"a list\n")
    Store(place).put("IMG0001", PICTURE)

    for images, options in ((tmp_path / "IMG0001", {}), (f"{place.uri}/IMG0001", {"s3": moto_s3.options})):
        plan = planned(images, options=options)
        assert {"IMG0001": "read"} == codes(plan)
        assert any("taken for one by its first bytes" in line for line in plan.summary.warnings)
    text = refusal(tmp_path / "notes.txt")
    assert "no known kind by its name, and no picture by its first bytes" in text
    assert "a list of pictures is a .csv" in text
    assert "no such file or folder" in refusal(tmp_path / "gone.jpg")
    assert "{a,b} is no pattern here" in refusal(f"{tmp_path}/{{a,b}}.jpg")
    assert "{a,b} is no pattern here" in refusal(f"{tmp_path}/*.{{jpg,png}}")
    with pytest.raises(JobRefused, match="a picture; wanted boxes"):
        make_plan(InputSettings(boxes=str(put(tmp_path, "a.jpg") / "a.jpg")))


def test_pictures_of_a_folder_that_are_such_by_content_alone_are_said(tmp_path):
    put(tmp_path, "a.jpg", "IMG0001", "photo.jpg_large")
    put(tmp_path, "notes.txt", "README", data=b"text")
    put(tmp_path, "raw.cr2", data=b"II*\x00 camera")

    plan = planned(tmp_path)

    assert ["a.jpg"] == ids(plan)
    assert 5 == plan.summary.skipped_files
    (line,) = [line for line in plan.summary.warnings if "first bytes" in line]
    assert line.startswith("2 of 4 other files checked are pictures")
    assert re.search(r"IMG0001 \(PNG\)", line)
