"""The commands that need only an output: status, publish, validate, inspect, clean; what retry finds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from hqlabel.jobs.commands import end_summary
from hqlabel.jobs.commands.retry import find_targets, refuse_lost_rights
from hqlabel.jobs.job_setup.printed_flags import retry_command
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results import render_images
from hqlabel.jobs.results.read_tables import failed_examples, find_images, sample_labelled
from hqlabel.jobs.terminal.progress import CallCounts
from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.job_state.job_file import Job, require_job
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import read_manifest
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, make_output
from tests.pipeline.made_units import MadeJob, make_context, make_job

FAILING = ("img-00007.jpg", "img-00021.jpg")
TOLERANT = ("--set", "limits.max_failure_rate=0.2")


@pytest.fixture
def made(tmp_path: Path) -> MadeJob:
    """A job of 22 images in 6 units, 2 units a part, all committed; 2 images failed."""
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit(failing=FAILING)
    return made


@pytest.fixture
def output(made: MadeJob) -> str:
    return made.store.place.uri


def test_status_counts_from_the_store_alone(made: MadeJob, output: str) -> None:
    code, out, _ = run("status", "--output", output, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["state"] == "complete"
    assert found["images"]["planned"] == found["images"]["done"] == 22
    assert found["images"]["failed_by_code"] == {"not_found": 2, "no_usable_box": 1}
    assert sum(found["images"]["by_status"].values()) == 22
    assert found["units"] == {"planned": 6, "done": 6, "counted": 6, "published": 0, "by_device": {}}


def test_status_of_an_unfinished_job_says_what_is_left(tmp_path: Path) -> None:
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit([0, 2])
    code, out, _ = run("status", "--output", str(tmp_path / "out"))
    assert code == 0
    assert "not finished" in out
    assert "8 of 22 done" in out
    assert "2 of 6 committed, 0 published" in out


def test_publish_marks_by_the_filters_given_and_remembers_them(output: str) -> None:
    code, _, err = run("publish", "--output", output, "--set", "filter.min_area_px=100", *TOLERANT)
    assert code == 0, err
    assert "published 6 of 6 units" in err
    first = _instances(output)
    assert any(row["reject_reason"] == "area" for row in first)
    saved = yaml.safe_load((Path(output) / "config.yaml").read_text())
    assert saved["filter"]["min_area_px"] == 100

    code, out, _ = run("publish", "--output", output, "--min-predicted-iou", "0.9", "--json")
    assert json.loads(out)["filters"]["min_area_px"] == 100
    again = _instances(output)
    assert any(row["reject_reason"] == "predicted_iou" for row in again)
    unmarked = [{k: v for k, v in row.items() if k not in ("accepted", "reject_reason")} for row in again]
    assert unmarked == [
        {k: v for k, v in row.items() if k not in ("accepted", "reject_reason")} for row in first
    ]


def test_publishing_elsewhere_takes_no_folder_for_the_jobs_hub_id(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(output) / "config.yaml").write_text("model:\n  checkpoint: org/name\n")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    code, _, err = run("publish", "--output", output, *TOLERANT)

    assert code == 0, err
    assert yaml.safe_load((Path(output) / "config.yaml").read_text())["model"]["checkpoint"] == "org/name"


def test_publishing_again_changes_no_byte(output: str) -> None:
    run("publish", "--output", output)
    before = _contents(output)
    run("publish", "--output", output)
    assert _contents(output) == before


def test_publish_and_status_judge_the_failures_as_label_does(output: str) -> None:
    over = "over the failure budget: 3 of 22 images failed (13.6%), limits.max_failure_rate is 0.05;"
    code, out, err = run("publish", "--output", output, "--json")
    assert code == json.loads(out)["exit_code"] == 3
    assert over in err

    code, out, _ = run("status", "--output", output)
    assert code == 0, "it was only asked"
    assert f"  budget  {over}" in out
    assert json.loads(run("status", "--output", output, "--json")[1])["over_budget"] is True

    code, out, err = run("publish", "--output", output, "--json", *TOLERANT)
    assert code == json.loads(out)["exit_code"] == 0
    assert "budget" not in err


def test_nothing_is_judged_before_the_end(tmp_path: Path) -> None:
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit([0, 1, 2], failing=("img-00003.jpg",))
    code, _, err = run("publish", "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert "budget" not in run("status", "--output", str(tmp_path / "out"))[1]


def test_an_unfinished_job_publishes_its_whole_ranges(tmp_path: Path) -> None:
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit([0, 1, 2])
    code, out, _ = run("publish", "--output", str(tmp_path / "out"), "--json")
    assert code == 0
    assert json.loads(out)["units"] == {"planned": 6, "published": 2}


def test_validate_is_0_when_sound_and_6_naming_the_file_when_not(output: str) -> None:
    run("publish", "--output", output)
    code, _, err = run("validate", "--output", output)
    assert code == 0, err
    assert "sound; 6 units, 3 parts" in err

    part = Path(output) / "instances" / "part-00001.parquet"
    body = bytearray(part.read_bytes())
    body[len(body) // 2] ^= 1
    part.write_bytes(body)
    code, out, err = run("validate", "--output", output, "--json")
    assert code == 6
    assert "damaged: instances/part-00001.parquet" in err
    assert not json.loads(out)["sound"]


def test_clean_asks_first_and_then_keeps_the_tables(output: str) -> None:
    run("publish", "--output", output)
    tables = {name: body for name, body in _contents(output).items() if "/part-" in name}
    code, _, err = run("clean", "--output", output)
    assert code == 0
    assert "nothing was deleted" in err
    assert len(list((Path(output) / "units").iterdir())) == 6

    code, _, err = run("clean", "--output", output, "--yes")
    assert code == 0, err
    assert not any((Path(output) / "units").glob("*.parquet"))
    assert {name: body for name, body in _contents(output).items() if "/part-" in name} == tables
    assert run("validate", "--output", output)[0] == 0
    code, _, err = run("retry", "--output", output)
    assert code in (2, 4)


def test_clean_refuses_a_job_that_is_not_published(output: str) -> None:
    for arguments in (["--yes"], []):
        code, _, err = run("clean", "--output", output, *arguments)
        assert code == 4
        assert "not every unit is published" in err


def test_inspect_shows_the_rows_of_one_image(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # With another test's credentials each try would wait for a store that does not answer.
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    for publish_first in (False, True):  # found in its unit, then in the tables
        if publish_first:
            run("publish", "--output", output)
        code, out, err = run("inspect", "img-00014.jpg", "--output", output)
        assert code == 0, err
        assert "4 given" in out
        assert "no picture" in err  # the made job's images lie nowhere
        code, out, _ = run("inspect", "img-00014.jpg", "--output", output, "--json")
        found = json.loads(out)
        assert found["image"]["image_id"] == "img-00014.jpg"
        assert [row["instance_index"] for row in found["instances"]] == [0, 1, 2, 3]
        assert found["picture"] is None
    code, out, _ = run("inspect", FAILING[0], "--output", output)
    assert "not_found (fetch): 404" in out


def test_inspect_of_an_unknown_image_is_wrong_usage(output: str) -> None:
    code, _, err = run("inspect", "nobody.jpg", "--output", output)
    assert code == 2
    assert "no image has the image_id 'nobody.jpg'" in err


def test_inspect_of_an_image_that_waits_says_so(tmp_path: Path) -> None:
    make_job(Store(Place(uri=str(tmp_path / "out"))))
    code, _, err = run("inspect", "img-00014.jpg", "--output", str(tmp_path / "out"))
    assert code == 2
    assert "not labelled yet" in err


def test_rows_are_found_by_the_footers_of_the_parts(made: MadeJob, output: str) -> None:
    run("publish", "--output", output)
    manifest = read_manifest(made.store)
    assert manifest is not None
    for image_id in made.plan["image_id"].to_pylist():
        found = find_images(made.store, manifest, [image_id]).get(image_id)
        assert found is not None
        assert found.image["image_id"] == image_id
        assert len(found.instances) == found.image["num_boxes"]
    assert find_images(made.store, manifest, ["img-00007"]).get("img-00007") is None
    sample = [rows.image["image_id"] for rows in sample_labelled(made.store, manifest, 5)]
    assert sample == sorted(set(sample))
    assert len(sample) == 5
    examples = failed_examples(made.store, manifest, per_code=1)
    assert {code: len(rows) for code, rows in examples.items()} == {"not_found": 1, "no_usable_box": 1}


def test_retry_finds_the_units_with_failed_images_published_or_not(made: MadeJob, output: str) -> None:
    def found(*codes: str) -> dict[int, tuple[int, int]]:
        return {u: (t.generation, t.images) for u, t in find_targets(made.store, made.job, codes).items()}

    by_unit = {1: (1, 1), 5: (1, 1)}  # images 7 and 21, four images a unit
    assert found("not_found") == by_unit
    run("publish", "--output", output)
    assert found("not_found") == by_unit
    assert found("denied") == {}
    assert sum(images for _, images in found().values()) == 3
    made.commit([1], generation=1)  # a retry that mended unit 1, not published yet
    assert found("not_found") == {5: (1, 1)}


def test_retry_refuses_to_lose_the_rights_to_read_what_it_does_again(tmp_path: Path) -> None:
    images = [MadeImage(image_id="a", error="truncated"), MadeImage(image_id="b", error="not_found")]
    images.append(MadeImage(image_id="c", error="truncated", uri="https://h/c.jpg"))
    store = Store(Place(uri=make_output(tmp_path / "out", images)))
    inputs = {"images": "s3://b/p", "allow_roots": ["/photos", "/other"], "allow_schemes": ["https"]}
    job = dataclasses.replace(require_job(store), identity={"inputs": {"arguments": inputs}})
    targets = find_targets(store, job, ())

    def check(roots: tuple[str, ...], schemes: tuple[str, ...], *codes: str) -> None:
        access = AccessRules(roots=roots, schemes=schemes)
        now = dataclasses.replace(job, context=dataclasses.replace(job.context, access=access))
        refuse_lost_rights(store, now, targets, codes)

    wanted = "3 images to do again lie outside .* Add --allow-root /photos --allow-scheme https$"
    with pytest.raises(JobRefused, match=wanted):
        check((), ("s3",))
    with pytest.raises(JobRefused, match=r"1 image to do again lies .* Add --allow-root /photos$"):
        check((), ("s3",), "not_found")
    check(("/photos",), ("s3",), "not_found")  # what is lost besides is of no image
    check(("/photos",), ("s3", "https"))


def test_retry_prints_the_folders_and_schemes_that_the_job_began_with(tmp_path: Path) -> None:
    photos = str(tmp_path)
    arguments = {"images": photos, "allow_roots": ["/else where"], "allow_schemes": ["https"]}
    job = Job(identity={"inputs": {"arguments": arguments}}, context=make_context(), plan={})
    text = retry_command("out", ConfigSources().load(), job)
    flags = f"--allow-root '/else where' --allow-root {photos} --allow-scheme https"
    assert text == f"hqlabel retry --output out --checkpoint w {flags}"

    broken = dataclasses.replace(job, identity={"inputs": {"arguments": {"allow_roots": ["a\0b", 3]}}})
    assert "--allow" not in retry_command("out", ConfigSources().load(), broken)


def test_retry_wants_a_finished_job(tmp_path: Path) -> None:
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit([0])
    with pytest.raises(JobRefused, match="5 of 6 units are not done yet"):
        find_targets(made.store, made.job, ())


@pytest.mark.parametrize(
    ("rate", "images", "failed", "over"),
    [
        (0.05, 8, 0, False), (0.05, 8, 1, True), (0.05, 1, 1, True), (0.05, 20, 1, False),
        (0.05, 19, 1, True),
        (0.05, 1000, 50, False), (0.05, 1000, 51, True), (0.0, 8, 0, False), (0.0, 10**6, 1, True),
        (1.0, 8, 8, False), (0.05, 0, 0, False), (0.0, 0, 0, False), (0.29, 100, 29, False),
        (0.29, 100, 30, True), (0.07, 100, 7, False), (0.1, 30, 3, False), (0.57, 100, 57, False),
    ],
)  # fmt: skip
def test_the_failure_budget_is_judged_whatever_the_size_and_a_share_at_the_limit_is_within(
    rate: float, images: int, failed: int, over: bool
) -> None:
    said = end_summary.over_budget(Limits(max_failure_rate=rate), images=images, failed=failed)
    assert over == (said is not None)


def test_the_sentence_on_the_budget_says_what_would_allow_it() -> None:
    limits = Limits()
    said = end_summary.over_budget(limits, images=8, failed=1) or ""
    assert said.startswith(
        "over the failure budget: 1 of 8 images failed (12.5%), limits.max_failure_rate is 0.05;"
    )
    assert said.count("\n") == 0
    for images, failed in ((8, 1), (3, 1), (1, 1), (1000, 999), (10, 7)):
        said = end_summary.over_budget(limits, images=images, failed=failed) or ""
        allowed = float(said.partition("--set limits.max_failure_rate=")[2].split()[0])
        assert end_summary.over_budget(Limits(max_failure_rate=allowed), images=images, failed=failed) is None
        assert allowed <= 1


def test_a_number_of_images_to_judge_from_can_still_be_set() -> None:
    limits = Limits(failure_rate_from_images=1000)
    assert end_summary.over_budget(limits, images=999, failed=999) is None
    assert end_summary.over_budget(limits, images=1000, failed=999) is not None


def test_the_next_command_can_be_pasted() -> None:
    config = ConfigSources(sets=["storage.s3={endpoint_url: 'http://h:1'}"])
    context = dataclasses.replace(
        make_context(), access=AccessRules(roots=("/ph otos",), schemes=("s3", "https"))
    )
    job = Job(identity={}, context=context, plan={"images": 1, "boxes": 1, "units": 1})
    commands = end_summary.next_commands("s3://b/o u t", config.load(), job, failed=1)
    store = """--output 's3://b/o u t' --set 'storage.s3={"endpoint_url": "http://h:1"}'"""
    assert commands[0].startswith(
        f"hqlabel retry {store} --checkpoint w --allow-root '/ph otos' --allow-scheme https"
    )
    assert commands[1] == f"hqlabel report {store} --allow-root '/ph otos' --allow-scheme https"
    assert f"hqlabel validate {store}" in commands


def test_an_overlay_is_drawn_from_the_published_rows(tmp_path: Path) -> None:
    from hqlabel.jobs.results.read_tables import ImageRows
    from hqlabel.jobs.results.render_images import overlay_png

    photo = tmp_path / "a.png"
    Image.new("RGB", (60, 40), (90, 90, 90)).save(photo)
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit()
    run("publish", "--output", str(tmp_path / "out"))
    manifest = read_manifest(made.store)
    assert manifest is not None
    rows = find_images(made.store, manifest, ["img-00009.jpg"]).get("img-00009.jpg")
    assert rows is not None
    here = ImageRows(image={**rows.image, "image_uri": str(photo)}, instances=rows.instances)
    context = make_context()
    context = type(context)(**{**vars(context), "access": AccessRules(roots=(str(tmp_path),))})
    (tmp_path / "overlay.png").write_bytes(overlay_png(context, here, longest_side=1600))
    drawn = Image.open(tmp_path / "overlay.png")
    assert drawn.size == (60, 40)
    assert len(drawn.getcolors(maxcolors=60 * 40)) > 3


def _instances(output: str) -> list[dict[str, object]]:
    parts = sorted((Path(output) / "instances").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def _contents(output: str) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(output)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(output).rglob("*"))
        if path.is_file() and "/owner/" not in str(path)
    }


def test_a_bug_is_named_first_however_few_images_met_it():
    failed = {"truncated": 90, "not_found": 50, "denied": 40, "empty": 30, "corrupt": 20, "internal": 1}
    examples = {"internal": [{"image_id": "a", "error_message": "decode: KeyError: 'x'"}]}

    first, example, *_, last = end_summary.describe_failures(failed, examples)

    assert first[1].startswith("internal 1: a bug in hqlabel or a library")
    assert example[1] == "such as a: decode: KeyError: 'x'"
    assert last[1].startswith("and 1 more codes")


def test_whatever_is_raised_on_a_picture_to_be_drawn_is_that_pictures(monkeypatch):
    def fetch(*_):
        raise ValueError("Port out of range")

    monkeypatch.setattr(render_images, "fetch_object", fetch)
    with pytest.raises(ImageError, match="draw: ValueError: Port out of range"):
        render_images.upright_picture(make_context(), {"image_uri": "http://h:99999/x"}, None)


def test_the_rate_of_a_run_that_is_mostly_the_start_of_ray_is_not_stated() -> None:
    counts = CallCounts(units=1, images=8, labelled=8, instances=52)
    short = SimpleNamespace(counts=counts, images=8, seconds=16.3, redone=None)
    long = SimpleNamespace(counts=counts, images=8, seconds=160.0, redone=None)

    assert end_summary.describe_run(short) == "8 images in this run, 16.3 s"
    assert end_summary.describe_run(long) == "8 images in this run, 2 min 40 s (0.05 images/s, 0.33 boxes/s)"


def test_a_slow_store_does_not_hold_up_the_end_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 61.0])
    monkeypatch.setattr(render_images, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(render_images, "upright_picture", lambda *_: None)
    monkeypatch.setattr(render_images, "_tile", lambda rows, *_: rows)

    rows = [SimpleNamespace(image=name) for name in ("first", "second", "third")]

    context = SimpleNamespace(access=None)

    assert list(render_images._tiles(context, rows, None)) == rows[:1]
    said = capsys.readouterr().err
    assert "2 more images could be on the contact sheet, but 60 s are over" in said
