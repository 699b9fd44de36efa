"""Names that are no good names of files: every format holds each image once, or counts what it left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hqlabel.jobs.commands.inspect_image import _picture_name
from tests.jobs.cli.test_cli import run
from tests.jobs.export.test_export import export
from tests.jobs.made_outputs import MadeImage, blob, make_output

UNFIT_FOR_YOLO = [
    *("../../up.jpg", "a/../../up.jpg", "a//b.jpg", "/etc/passwd.jpg", "//x/y.jpg", "/", ".", ".."),
    *("a\nb.jpg", "a\rb.jpg", "a\0b.jpg", "a\u2028b.jpg", "a.png "),
    *("n" * 252 + ".jpg", "\u00e9" * 126 + ".jpg", "d/" * 600 + "deep.jpg"),
]
FIT = [
    *("a\tb.jpg", " lead.jpg", "\x1b[31m.jpg", ".jpg", "https:%2F.jpg", "..\\..\\x.jpg", "C:\\x.bmp"),
    *("CON.jpg", "aux", "nul.txt", "images.txt", "labels/data.yaml", "x/images/y.jpg"),
    *("A.jpg", "a.jpg", "\u00c5.jpg", "A\u030a.jpg"),
    *("n" * 251 + ".jpg", "\u00e9" * 120 + ".jpg", "\U0001d11e" * 60 + ".jpg"),
]


def output_of(folder: Path, ids: list[str]) -> str:
    """A job over these ids; the uris have another form, so that each name is the id."""
    images = [
        MadeImage(
            image_id=one, masks=[blob(3)], categories=[(1, "cat\n\0|'\"")], uri=f"/photos/{one}"
        )
        for one in ids
    ]  # fmt: skip
    return make_output(folder, images)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return output_of(tmp_path_factory.mktemp("job") / "out", [*UNFIT_FOR_YOLO, *FIT])


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_yolo_leaves_out_and_counts_what_no_list_and_no_disk_holds(output: str, tmp_path: Path) -> None:
    to = tmp_path / "sub" / "yolo"
    said = export("yolo-seg", "--output", output, "--to", str(to))
    [(reason, number)] = said["left_out"].items()
    assert "more than 255 bytes" in reason
    assert number == len(UNFIT_FOR_YOLO)
    listed = (to / "images.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"./images/{one}" for one in FIT)
    labels = files_below(to) - {to / name for name in ("images.txt", "data.yaml", "classes.json")}
    assert len(labels) == len(FIT)
    assert files_below(tmp_path) == files_below(to)


@pytest.mark.parametrize("names", [["a", "a.txt/b.jpg"], ["b.txt/y.jpg", "b.zz"], ["x/y.jpg", "x/y.png"]])
def test_two_names_that_want_one_place_are_refused_by_name(names: list[str], tmp_path: Path) -> None:
    output = output_of(tmp_path / "out", names)
    code, _, err = run("export", "yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"))
    assert code == 2, err
    assert all(repr(name) in err for name in names)


def test_a_file_system_that_takes_two_names_for_one_loses_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of macOS and Windows do with `A` and `a`."""
    from hqlabel.pipeline.storage.output_store import Store

    real, seen = Store.put_if_absent, set()

    def without_case(self: Store, key: str, data: bytes) -> bool:
        if key.casefold() in seen:
            return False
        seen.add(key.casefold())
        return real(self, key, data)

    output = output_of(tmp_path / "out", ["A.jpg", "a.jpg"])
    monkeypatch.setattr(Store, "put_if_absent", without_case)
    code, _, err = run("export", "yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"))
    assert code == 2, err
    assert "a file system perhaps no case" in err


@pytest.mark.parametrize("format_", ["coco", "hf", "label-studio"])
def test_formats_without_files_of_images_hold_every_id_once_as_it_is(
    format_: str, output: str, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    export(format_, "--output", output, "--to", str(to))
    if format_ == "coco":
        found = pq.read_table(to / "image_ids.parquet")["image_id"].to_pylist()
        assert len(json.loads((to / "instances.json").read_text())["images"]) == len(found)
    elif format_ == "hf":
        found = pq.read_table(to / "data")["image_id"].to_pylist()
    else:
        found = [one["data"]["image_id"] for one in json.loads((to / "tasks-00001.json").read_text())]
    assert sorted(found) == sorted([*UNFIT_FOR_YOLO, *FIT])
    assert files_below(tmp_path) == files_below(to)


def test_inspect_and_report_take_every_name(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for one in [*UNFIT_FOR_YOLO, *FIT]:
        code, out, err = run("inspect", one, "--output", output, "--json")
        assert code == 0, err
        assert json.loads(out)["image"]["image_id"] == one
    assert run("report", "--output", output)[0] == 0
    assert files_below(tmp_path) == set()


def test_the_overlay_of_each_image_has_a_short_name_of_its_own_in_this_folder() -> None:
    names = [_picture_name(one) for one in [*UNFIT_FOR_YOLO, *FIT, "a b", "a_b", "a/b", "", "\u8a9e" * 200]]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) < 200 and not re.search(r"[/\0\n]|^\.", name) for name in names), names
    assert _picture_name("street-07.jpg") == "street-07.jpg.overlay.png"


def test_a_picture_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    from hqlabel.jobs.commands import inspect_image
    from hqlabel.pipeline.errors import UsageError

    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_image, "overlay_png", lambda *_, **__: b"")
        with pytest.raises(UsageError, match="see --picture"):
            inspect_image._draw(_Saved(), None, str(tmp_path / "file" / "x.png"))  # type: ignore[arg-type]


class _Saved:
    pictures = None


@pytest.mark.parametrize("boxes", [3, 100_000])
def test_the_work_of_drawing_does_not_grow_with_an_images_boxes(
    boxes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contact sheet and inspect draw what `_tile` returns, and one decoding is a whole mask."""
    import dataclasses

    from PIL import Image
    from pycocotools import mask as coco_mask

    from hqlabel.jobs.results.draw_overlays import contact_sheet
    from hqlabel.jobs.results.read_tables import ImageRows
    from hqlabel.jobs.results.render_images import _tile
    from tests.jobs.made_outputs import rle_of
    from tests.pipeline.made_units import make_context

    mask = {**rle_of(blob(3)), "size": [60, 80]}
    row = {
        "segmentation": mask, "prompt_bbox": [1.0, 1.0, 9.0, 9.0], "prompt_bbox_given": None, "area": 5,
        "category_name": "cat", "predicted_iou": 0.5, "accepted": True, "reject_reason": None,
    }  # fmt: skip
    rows = ImageRows(image={"image_id": "a", "width": 6000, "height": 4000}, instances=(row,) * boxes)
    decoded = []
    real = coco_mask.decode
    monkeypatch.setattr(coco_mask, "decode", lambda one: decoded.append(1) or real(one))
    tile = _tile(rows, Image.new("RGB", (60, 40)), dataclasses.replace(make_context()))
    contact_sheet([tile], title="")
    assert len(decoded) == min(boxes, 178)
    assert ("178 drawn" in tile.remark) == (boxes > 178)
