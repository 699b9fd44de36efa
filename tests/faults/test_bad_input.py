"""One job over every kind of bad and odd input beside good ones: each image and box has its outcome."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import BOX_CODES, MAX_MESSAGE_CHARS, stage_of
from tests.e2e import commands
from tests.e2e.scenes import small_checkpoint
from tests.faults import corpus, probe
from tests.faults.corpus import Case

Rows = dict[str, dict[str, Any]]
LIMITS = {
    "limits.max_image_bytes": 4 * 2**20,
    "limits.max_boxes_per_image": 2000,
    "limits.decode_memory_bytes": 2**30,
    "output.images_per_unit": 32,
    "model.dtype": "float32",
    "cluster.actors": 1,
}
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_uri", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("box_ids", pa.list_(pa.string())),
    ]
)


pytestmark = pytest.mark.timeout(600)  # a whole job of many pictures, on a machine that may be busy


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished job: its cases, its rows by image, its instances by image and box, and what it said."""

    root: Path
    output: Path
    cases: list[Case]
    images: Rows
    instances: dict[str, list[dict[str, Any]]]
    said: str


def uri_of(case: Case, root: Path) -> str:
    return f"{root}/{case.name}" if case.uri is None else case.uri


def row(case: Case, root: Path, *, only_good: bool) -> dict[str, Any]:
    """The row of the box table; `only_good`: without the boxes that are rejected."""
    kept = [i for i, (_, reason, _) in enumerate(case.boxes or ()) if reason is None or not only_good]
    boxes, labels, scores = case.given(), case.labels, case.scores

    def pick(values: tuple[Any, ...] | None) -> list[Any] | None:
        if values is None:
            return None
        return [values[i] for i in kept] if only_good else list(values)

    return {
        "image_id": case.name,
        "image_uri": uri_of(case, root),
        "boxes": None if boxes is None else [boxes[i] for i in kept],
        "labels": pick(labels),
        "scores": pick(scores),
        "box_ids": None if boxes is None else [str(i) for i in kept],
    }


def command(root: Path, rows: list[dict[str, Any]], checkpoint: Path, output: Path) -> list[str]:
    """A call of `label` over a table of these rows."""
    table = root / f"{output.name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), table)
    sets = [part for name, value in LIMITS.items() for part in ("--set", f"{name}={value}")]
    inputs = ["--boxes", str(table), "--checkpoint", str(checkpoint), "--output", str(output)]
    return ["label", *inputs, *sets]


def done(root: Path, output: Path, cases: list[Case], said: str) -> Done:
    images, instances = commands.tables(output)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for one in instances.to_pylist():
        grouped.setdefault(one["image_id"], []).append(one)
    return Done(
        root=root,
        output=output,
        cases=cases,
        images={one["image_id"]: one for one in images.to_pylist()},
        instances=grouped,
        said=said,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Case], Path]]:
    """The folder of pictures, all cases, and a checkpoint."""
    base = tmp_path_factory.mktemp("bad")
    root, outside = base / "root", base / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(corpus.encode(corpus.quadrants(), "PNG"))
    cases = [*corpus.picture_cases(outside), *corpus.box_cases()]
    for case in cases:
        if case.place is not None:
            case.place(root)
    return root, cases, small_checkpoint(base / "weights")


@pytest.fixture(scope="module")
def everything(world: tuple[Path, list[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All cases through the command; more of them fail than the budget allows, so it ends with 3."""
    root, cases, checkpoint = world
    output = tmp_path_factory.mktemp("out") / "everything"
    rows = [row(case, root, only_good=False) for case in cases]
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.probe", *command(root, rows, checkpoint, output)],
        cwd=commands.REPOSITORY,
        env={**os.environ, "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 3, said
    assert "over the failure budget" in said
    return done(root, output, cases, said)


@pytest.fixture(scope="module")
def only_good(world: tuple[Path, list[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    root, cases, checkpoint = world
    output = tmp_path_factory.mktemp("out") / "good"
    good = [case for case in cases if case.is_good]
    rows = [row(case, root, only_good=True) for case in good]
    said = commands.label_here(*command(root, rows, checkpoint, output)).stderr
    return done(root, output, good, said)


def _of_the_box(reason: str | None) -> str | None:
    """The reason, unless it is a filter's word on a mask."""
    return reason if reason in BOX_CODES else None


def outcome(row: dict[str, Any]) -> str:
    return row["error_code"] if row["status"] == "failed" else row["status"]


@pytest.mark.slow
def test_the_corpus_is_as_large_as_it_should_be(everything: Done) -> None:
    assert sum(case.place is not None for case in everything.cases) >= 120
    assert len(everything.images) == len(everything.cases) == len({case.name for case in everything.cases})


@pytest.mark.slow
def test_every_image_has_the_outcome_that_its_case_says(everything: Done) -> None:
    found = {case.name: outcome(everything.images[case.name]) for case in everything.cases}

    assert {
        case.name: found[case.name] for case in everything.cases if found[case.name] not in case.codes
    } == {}


@pytest.mark.slow
def test_every_uri_comes_back_byte_for_byte(everything: Done) -> None:
    for case in everything.cases:
        given = uri_of(case, everything.root)
        relative = f"{everything.root}/{given}"
        assert everything.images[case.name]["image_uri"] in (given, relative), case.name


@pytest.mark.slow
def test_every_box_has_a_row_with_its_reason_and_its_flags(everything: Done) -> None:
    unlike = {}
    for case in everything.cases:
        rows = everything.instances.get(case.name, [])
        failed = everything.images[case.name]["status"] == "failed"
        found = [(one["instance_index"], _of_the_box(one["reject_reason"])) for one in rows]
        wanted = [
            (i, reason or ("image_failed" if failed else None))
            for i, (_, reason, _) in enumerate(case.boxes or ())
        ]
        loose = failed and [index for index, _ in found] == [index for index, _ in wanted]
        if found != wanted and not (loose and {reason for _, reason in found} == {"image_failed"}):
            unlike[case.name] = (found[:6], wanted[:6])
        for one, (_, reason, flags) in zip(rows, case.boxes or (), strict=True):
            if not failed:
                assert set(flags) <= set(one["qc_flags"]), case.name
                assert ("box_clipped" in one["qc_flags"]) == ("box_clipped" in flags), case.name
                assert (one["segmentation"] is None) == (reason is not None), case.name

    assert unlike == {}
    assert sum(map(len, everything.instances.values())) == sum(
        len(case.boxes or ()) for case in everything.cases
    )


@pytest.mark.slow
def test_colours_of_every_good_format_are_right(everything: Done) -> None:
    wrong = {}
    for case in everything.cases:
        for one, name in zip(everything.instances.get(case.name, []), corpus.BOXES, strict=False):
            if name in case.colours:
                found, wanted = probe.colour_of(one["predicted_iou"]), case.colours[name]
                if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > case.within:
                    wrong[f"{case.name} {name}"] = (found, wanted)

    assert wrong == {}
    assert sum(bool(case.colours) for case in everything.cases) >= 60


@pytest.mark.slow
def test_upright_sizes_are_right(everything: Done) -> None:
    for case in everything.cases:
        if case.size_hw is not None:
            found = everything.images[case.name]
            assert (found["height"], found["width"]) == case.size_hw, case.name


@pytest.mark.slow
def test_masks_are_those_of_a_job_without_the_bad_ones(everything: Done, only_good: Done) -> None:
    compared = 0
    for case in only_good.cases:
        beside = {one["box_id"]: one for one in everything.instances[case.name]}
        for alone in only_good.instances[case.name]:
            for column in ("segmentation", "area", "bbox", "prompt_bbox", "stability_score", "box_iou"):
                assert alone[column] == beside[alone["box_id"]][column], (case.name, column)
            compared += alone["segmentation"] is not None
    assert compared > 2300


@pytest.mark.slow
def test_labels_and_scores_pass_unchanged(everything: Done) -> None:
    odd = everything.instances["x/odd labels.png"]
    assert [one["category_name"] for one in odd] == ["", "a\nb", "\"q'", "x" * 10_000, "nul\0", "=1+1"]
    assert [one["category_name"] for one in everything.instances["x/null labels.png"]] == [None, "b"]
    scores = everything.instances["x/odd scores.png"]
    assert [one["detector_score"] for one in scores[1:3]] == [-1.0, 7.5]
    assert scores[0]["detector_score"] is None
    assert "score_not_finite" in scores[0]["qc_flags"]
    assert (
        len({one["segmentation"]["counts"] for one in everything.instances["x/the same three times.png"]})
        == 1
    )


@pytest.mark.slow
def test_error_texts_are_short_single_lines_without_what_the_files_hold(everything: Done) -> None:
    for case in everything.cases:
        found = everything.images[case.name]
        if found["status"] != "failed":
            assert found["error_message"] is None
            continue
        text = found["error_message"]
        assert found["error_stage"] == stage_of(found["error_code"])
        assert text is not None or found["error_code"] in ("boxes_missing", "no_usable_box"), case.name
        assert len(text or "") <= MAX_MESSAGE_CHARS
        assert (text or "").isprintable(), case.name
        assert "CANARY" not in (text or ""), case.name


@pytest.mark.slow
def test_nothing_was_run_by_a_name_or_a_picture(everything: Done) -> None:
    places = (commands.REPOSITORY, Path.home(), everything.root, everything.root.parent, everything.output)
    assert [place / "CANARY" for place in places if (place / "CANARY").exists()] == []


@pytest.mark.slow
def test_the_job_says_what_it_saw(everything: Done) -> None:
    assert "uri_refused" in everything.said
    assert "over the failure budget: " in everything.said
    assert len(everything.said.splitlines()) < 80, everything.said
    assert "CANARY" not in everything.said, everything.said
