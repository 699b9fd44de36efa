"""A detector in the whole job, on two model processes: boxes, masks, identity and licences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from hqlabel.model.records import resize_longest_side
from hqlabel.pipeline.images.decode_upright import decode_image
from tests.docs.markdown import blocks
from tests.e2e import commands
from tests.e2e.scenes import picture
from tests.jobs.cli.test_cli import run
from tests.model import made_detectors
from tests.model.made_detectors import PROMPTS

pytestmark = pytest.mark.timeout(300)
LONGEST = 100
PLACES = ("--set", "cluster.actors=2", "--set", "output.images_per_unit=3", "--no-progress")
ASKED = ("--set", f"detector.longest_side={LONGEST}", "--set", "detector.score_threshold=0.25")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of mixed sizes, one of them stored turned."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(9):
        exif = Image.Exif()
        if index == 4:
            exif[0x0112] = 6
        picture(index).save(folder / f"{index}.jpg", quality=92, exif=exif)
    return folder


def label(photos: Path, checkpoint: Path, output: Path, *more: str, code: int = 0, **environment: str) -> str:
    inputs = ["--images", str(photos), "--checkpoint", str(checkpoint), "--output", str(output)]
    return commands.run("label", *inputs, *PLACES, *ASKED, *more, code=code, **environment).stderr


def plain_loop(
    folder: Path, photos: Path, prompts: list[str] | None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes, scores and labels by image, best first: transformers over the upright pictures at the same size.

    Labels: the library's own class numbers; of a zero-shot detector nothing.
    """
    if prompts is None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    else:
        processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    found = {}
    for path in sorted(photos.iterdir()):
        upright = decode_image(
            path.read_bytes(), max_pixels=10**8, side=max(Image.open(path).size)
        ).pixels_hwc
        shown = resize_longest_side(upright, min(LONGEST, max(upright.shape[:2])))
        inputs = {"images": Image.fromarray(shown), "return_tensors": "pt"}
        inputs |= {} if prompts is None else {"text": [prompts]}
        with torch.no_grad():
            outputs = model(**processor(**inputs))
        name = "object" if prompts is None else "grounded_object"
        [one] = getattr(processor, f"post_process_{name}_detection")(
            outputs, threshold=0.25, target_sizes=[shown.shape[:2]]
        )
        order = np.argsort(-one["scores"].numpy(), kind="stable")
        scale = np.array([upright.shape[1] / shown.shape[1], upright.shape[0] / shown.shape[0]] * 2)
        labels = one["labels"].numpy()[order] if prompts is None else np.zeros(0, int)
        found[path.name] = (one["boxes"].numpy()[order] * scale, one["scores"].numpy()[order], labels)
    return found


def by_image(instances: pa.Table) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in instances.to_pylist():
        found.setdefault(row["image_id"], []).append(row)
    return found


@pytest.mark.parametrize("kind", ["rt_detr_v2", pytest.param("grounding_dino", marks=pytest.mark.faults)])
def test_a_detector_in_the_job_finds_what_a_plain_loop_finds(
    kind: str, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    make = {"rt_detr_v2": made_detectors.small_rt_detr, "grounding_dino": made_detectors.small_grounding_dino}
    folder, output = make[kind](tmp_path / "detector"), tmp_path / "out"
    prompts = None if kind == "rt_detr_v2" else PROMPTS
    asked = ["--detector", f"hf:{folder}"]
    if prompts:
        asked = ["--detector", f"hf-zero-shot:{folder}", "--set", f"detector.prompts={json.dumps(prompts)}"]

    said = label(photos, checkpoint, output, *asked)

    images, instances = commands.tables(output)
    wanted, found = plain_loop(folder, photos, prompts and list(prompts)), by_image(instances)
    assert sum(len(boxes) for boxes, _, _ in wanted.values()) > 20
    for name, (boxes, scores, labels) in wanted.items():
        rows = found.get(name, [])
        np.testing.assert_allclose(
            np.array([row["prompt_bbox_given"] for row in rows]).reshape(-1, 4), boxes, rtol=0, atol=1e-3
        )
        np.testing.assert_allclose([row["detector_score"] for row in rows], scores, atol=1e-6)
        if prompts is None:
            assert [row["category_id"] for row in rows] == labels.tolist()
            assert [row["category_name"] for row in rows] == [made_detectors.LABELS[one] for one in labels]
        assert all((row["segmentation"] is None) == (row["prompt_bbox"] is None) for row in rows)
    names = set(made_detectors.LABELS.values()) if prompts is None else set(PROMPTS.values())
    assert {row["category_name"] for rows in found.values() for row in rows} <= names
    assert images["image_id"].to_pylist() == sorted(wanted)
    assert all(value > 0 for value in images["detect_ms"].to_pylist())
    job = json.loads((output / "job.json").read_text())
    fingerprint = job["identity"]["detector"]["fingerprint"]
    footer = pq.read_schema(next((output / "instances").glob("*.parquet"))).metadata
    assert footer[b"hqlabel.detector_fingerprint"].decode() == fingerprint
    assert footer[b"hqlabel.detector_license"] == b"apache-2.0"
    assert "licence apache-2.0" in said
    assert fingerprint[:12] in said
    assert run("validate", "--output", str(output), "--all-masks")[0] == 0

    if kind == "rt_detr_v2":
        refuse_changes(photos, checkpoint, output, folder, asked, tmp_path)


def refuse_changes(
    photos: Path, checkpoint: Path, output: Path, folder: Path, asked: list[str], tmp_path: Path
) -> None:
    """The same again does nothing, also with a moved detector; another one, or another size, is refused."""
    before = commands.contents(output)
    inputs = ["label", "--images", str(photos), "--checkpoint", str(checkpoint), "--output", str(output)]
    moved = folder.rename(tmp_path / "moved")
    again, _, said = run(*inputs, *PLACES, *ASKED, "--detector", f"hf:{moved}")
    other = made_detectors.small_rt_detr(folder, seed=1)
    refused, _, changed = run(*inputs, *PLACES, *ASKED, "--detector", f"hf:{other}")
    size = ["--set", "detector.longest_side=90", "--set", "detector.score_threshold=0.25"]
    refused_too, _, larger = run(*inputs, *PLACES, *size, "--detector", f"hf:{moved}")

    assert (again, refused, refused_too) == (0, 4, 4)
    assert "nothing was left to do" in said
    assert "detector.fingerprint: the job there has" in changed
    assert f"detector.longest_side: the job there has {LONGEST}, now 90" in larger
    owners = {name for name in before if name.startswith("owner/")}
    after = commands.contents(output)
    assert {name: after[name] for name in after if name not in owners and not name.startswith("owner/")} == {
        name: before[name] for name in before if name not in owners
    }


@pytest.mark.faults
def test_the_documented_example_of_ones_own_detector_runs_and_is_never_taken_from_an_output(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    page = Path(commands.REPOSITORY, "docs", "detectors.md").read_text()
    [example] = blocks(page, "python")
    (tmp_path / "own.py").write_text(example)
    path = os.pathsep.join([str(tmp_path), str(commands.REPOSITORY)])
    output = tmp_path / "out"

    said = label(photos, checkpoint, output, "--detector", "own:BrightSpot", PYTHONPATH=path)
    again = ("retry", "--output", str(output), "--checkpoint", str(checkpoint))
    retried = commands.run(*again, code=2, PYTHONPATH=path)
    doctor = commands.run("doctor", "--no-ray", "--detector", "own:BrightSpot", code=0, PYTHONPATH=path)

    images, instances = commands.tables(output)
    assert set(images["status"].to_pylist()) <= {"labelled", "no_boxes"}
    assert instances.num_rows > 0
    assert "licence MIT" in said
    assert "never taken from an output" in retried.stderr
    assert "bright spot; 1 category; fingerprint bright spot, version 1; licence MIT" in doctor.stdout
