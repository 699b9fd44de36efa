"""Outputs from elsewhere are data: no command connects, reads or runs what they name, or drowns in them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hqlabel.jobs.commands.retry
import hqlabel.jobs.evaluate.evaluate
import hqlabel.jobs.export.export
import hqlabel.jobs.report.page  # noqa: F401  # loaded before the time is taken
from hqlabel.pipeline.tables.manifest import MANIFEST_KEY
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output

READERS = {
    "status": ["status"],
    "validate": ["validate"],
    "clean": ["clean"],
    "publish": ["publish"],
    "retry": ["retry", "--checkpoint", "demo"],
    "report": ["report"],
    "inspect": ["inspect", "a.jpg", "--picture", "/dev/null"],
    "export": ["export", "coco", "--to", "TO"],
    "evaluate": ["evaluate", "--truth", "/nowhere.json"],
}
MOST_S = 2.0
MOST_CHARS = 4000
DEEP = 100_000
NO_KIND = "filter: {nms_iou: [9]}"


def change(folder: Path, name: str, **values: Any) -> None:
    """Put values into a JSON file of an output, by dotted name."""
    content = json.loads((folder / name).read_text())
    for dotted, value in values.items():
        *path, leaf = dotted.split("__")
        place = content
        for step in path:
            place = place[int(step) if isinstance(place, list) else step]
        place[leaf] = value
    (folder / name).write_text(json.dumps(content))


def huge(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(4 * 2**30)  # a sparse file


def alias_bomb(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (folder / "config.yaml").write_text("\n".join([*lines, "filter: {min_area_px: *a11}"]))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "job.json of 4 GiB": lambda folder: huge(folder, "job.json"),
    "job.json nested": lambda folder: void((folder / "job.json").write_text('{"a":' * DEEP)),
    "10**18 units": lambda folder: change(folder, "job.json", plan__units=10**18, plan__images=64 * 10**18),
    "fewer units than images": lambda folder: change(folder, "job.json", plan__images=10**15),
    "negative units": lambda folder: change(folder, "job.json", plan__units=-1),
    "a plan elsewhere": lambda folder: change(folder, "job.json", context__plan_sha256="../../../etc/passwd"),
    "units a part of 0": lambda folder: change(folder, "job.json", units_per_part=0),
    "weights of text": lambda folder: change(folder, "job.json", context__weights="x" * 10**6),
    "categories of lists": lambda folder: change(folder, "job.json", categories=[[1]] * 10**5),
}
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "manifest of 4 GiB": lambda folder: huge(folder, MANIFEST_KEY),
    "manifest nested": lambda folder: void((folder / MANIFEST_KEY).write_text("[" * DEEP)),
    "10**18 units in the manifest": lambda folder: change(folder, MANIFEST_KEY, units=10**18, cleaned=True),
    "a part of 10**18 units": lambda folder: change(folder, MANIFEST_KEY, parts__0__stop_unit=10**18),
    "100,000 parts of nothing": lambda folder: change(folder, MANIFEST_KEY, parts=[{}] * 10**5),
}
CONFIGS: dict[str, Callable[[Path], None]] = {
    "config.yaml of 4 GiB": lambda folder: huge(folder, "config.yaml"),
    "config.yaml of aliases": alias_bomb,
    "config.yaml in a circle": lambda folder: void((folder / "config.yaml").write_text("a: &a [*a]\n")),
    "config.yaml of brackets": lambda folder: void((folder / "config.yaml").write_text("a: " + "[" * DEEP)),
    "config.yaml of dashes": lambda folder: void((folder / "config.yaml").write_text("- " * DEEP)),
    "config.yaml of no kind": lambda folder: void((folder / "config.yaml").write_text(NO_KIND)),
}


def void(_: object) -> None:
    """Nothing, for a lambda that writes."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.jpg"
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(photo)
    images = [
        MadeImage(image_id="a.jpg", masks=[blob(1)], uri=str(photo)),
        MadeImage(image_id="b.jpg", error="not_found"),
    ]
    return Path(make_output(tmp_path / "out", images))


QUICK = ("status", "publish")
FAULTS = {**HOSTILE, **MANIFESTS, **CONFIGS}
CASES = [
    pytest.param(command, fault, marks=[] if command in QUICK else [pytest.mark.faults])
    for fault in FAULTS
    for command in READERS
]


@pytest.mark.parametrize(("command", "fault"), CASES)
def test_a_hostile_folder_is_refused_soon_and_in_few_words(
    command: str, fault: str, output: Path, tmp_path: Path
) -> None:
    FAULTS[fault](output)
    arguments = [str(tmp_path / "to") if one == "TO" else one for one in READERS[command]]

    began = time.process_time()
    code, out, err = run(*arguments, "--output", str(output))
    took = time.process_time() - began

    assert took < MOST_S
    assert len(out) + len(err) < MOST_CHARS
    assert "Traceback" not in err
    if fault in HOSTILE:
        assert code in (2, 4, 6), err
    else:  # a command that does not need the file goes on without it
        assert code in (0, 2, 3, 4, 6), err


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what came in there."""
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                got.append(peer.recv(100))
                peer.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], got


@pytest.mark.parametrize("command", READERS)
def test_nothing_that_an_output_names_is_joined_read_or_run(
    command: str,
    output: Path,
    tmp_path: Path,
    listener: tuple[int, list[bytes]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    port, got = listener
    private = tmp_path / "photos" / "a.jpg"
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (output / "config.yaml").write_text(
        f"""
input: {{images: /, image_root: /, allow_roots: [/], allow_schemes: [http, https, file]}}
model: {{checkpoint: 's3://bucket/evil.pth', dtype: bfloat16}}
detector: {{name: 'evil:Detector'}}
cluster: {{ray_address: '127.0.0.1:{port}', shared_paths: true, actors: 100000}}
limits: {{max_image_pixels: 1000000000000, decode_memory_bytes: 1000000000000}}
output: {{uri: 's3://bucket/elsewhere'}}
storage:
  s3: {{endpoint_url: 'http://127.0.0.1:{port}'}}
  file: {{auto_mkdir: true}}
"""
    )
    change(
        output, "job.json", context__access={"roots": ["/"]}, context__output={"uri": "s3://bucket/x"},
        context__segmenter="evil:run", context__decoder="evil:run",
        context__weights__source="s3://bucket/evil.pth", context__weights__options={"endpoint_url": f"http://127.0.0.1:{port}"},
    )  # fmt: skip
    arguments = [str(tmp_path / "to") if one == "TO" else one for one in READERS[command]]

    _, _, err = run(*arguments, "--output", str(output))

    assert got == []
    assert not (tmp_path / "ran").exists()
    if command in ("report", "inspect"):
        assert "see --allow-root" in err
    if command == "report":
        assert "data:image/jpeg" not in (output / "report" / "index.html").read_text()
    assert private.exists()


@pytest.mark.parametrize(
    ("command", "setting", "code", "said"),
    [
        ("retry", "boxes.min_score=0.5", 4, "boxes.min_score: the job has None, now 0.5"),
        ("retry", "boxes.expand=0.1", 4, "boxes.expand: the job has 0.0, now 0.1"),
        ("retry", "model.stability_offset=2", 4, "model.stability_offset: the job has 1.0, now 2.0"),
        ("retry", "output.images_per_unit=9", 4, "output.images_per_unit: the job has 4, now 9"),
        ("retry", "detector.score_threshold=0.9", 2, "retry does not use it"),
        ("retry", "cost.usd_per_gpu_hour=1", 2, "retry does not use it"),
        ("publish", "boxes.min_score=0.5", 4, "boxes.min_score: the job has None, now 0.5"),
        ("publish", "model.multimask=best", 4, "model.multimask: the job has 'single', now 'best'"),
        ("publish", "limits.max_image_pixels=9", 4, "limits.max_image_pixels: the job has 89478485, now 9"),
        ("status", "boxes.min_score=0.5", 4, "boxes.min_score"),
        ("validate", "cluster.actors=2", 2, "validate does not use it"),
        ("report", "filter.min_area_px=9", 2, "report does not use it"),
        ("clean", "filter.min_area_px=9", 2, "clean does not use it"),
        ("export", "input.allow_roots=[/]", 2, "export does not use it"),
    ],
)
def test_a_setting_that_a_command_does_not_use_is_refused_not_ignored(
    command: str, setting: str, code: int, said: str, output: Path, tmp_path: Path
) -> None:
    before = (output / "job.json").read_bytes()
    arguments = [str(tmp_path / "to") if one == "TO" else one for one in READERS[command]]

    found, _, err = run(*arguments, "--output", str(output), "--set", setting)

    assert found == code, err
    assert said in err
    assert (output / "job.json").read_bytes() == before
    assert not (output / "config.yaml").exists(), "nothing was saved"


def test_a_value_that_is_the_jobs_may_be_said_again(output: Path) -> None:
    code, _, err = run(
        "publish",
        "--output",
        str(output),
        "--set",
        "boxes.min_score=null",
        "--set",
        "filter.min_area_px=5",
        "--set",
        "limits.max_failure_rate=1",
    )

    assert code == 0, err
    assert "min_area_px: 5" in (output / "config.yaml").read_text()


def test_publish_keeps_what_the_saved_configuration_says_of_the_rest(output: Path) -> None:
    (output / "config.yaml").write_text("input: {images: photos}\nlimits: {max_failure_rate: 1.0}\n")

    code, _, err = run("publish", "--output", str(output), "--min-predicted-iou", "0.5")

    assert code == 0, err
    text = (output / "config.yaml").read_text()
    assert "images: photos" in text
    assert "min_predicted_iou: 0.5" in text
    assert "max_failure_rate: 1.0" in text
