"""hqlabel publish --merge: daily drops as one output; every image once, the newest row of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline import schema
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output


def drop(folder: Path, *images: MadeImage, **how) -> str:
    return make_output(folder, images, images_per_unit=2, **how)


def image(name: str, *seeds: int, **fields) -> MadeImage:
    masks = [blob(seed) for seed in seeds]
    return MadeImage(image_id=name, masks=masks, **({"categories": [(1, "cat")] * len(masks)} | fields))


def merge(to: Path, *outputs: str) -> dict:
    code, out, err = run("publish", "--output", str(to), "--merge", *outputs, "--json")
    assert code == 0, err
    return json.loads(out)


def table(output: Path | str, name: str) -> list[dict]:
    return pq.read_table(Path(output) / name).to_pylist()


@pytest.mark.parametrize("order", [1, -1])
def test_every_image_is_there_once_with_all_the_instances_of_its_newest_row(
    tmp_path: Path, order: int
) -> None:
    monday = drop(tmp_path / "monday", image("a", 1, 2), image("b", 3), image("c"), image("d", 4))
    tuesday = drop(tmp_path / "tuesday", image("b", 5, 6, 7), image("d", 8, error="not_found"), image("e", 9))

    said = merge(tmp_path / "all", *[monday, tuesday][::order])

    rows = {row["image_id"]: row for row in table(tmp_path / "all", "images")}
    assert list(rows) == ["a", "b", "c", "d", "e"]
    assert said["doubled"] == 2
    instances = table(tmp_path / "all", "instances")
    expected = [
        row
        for source, names in ((monday, {"a", "d"}), (tuesday, {"b", "e"}))
        for row in table(source, "instances")
        if row["image_id"] in names
    ]
    assert instances == sorted(expected, key=lambda row: (row["image_id"], row["instance_index"]))
    assert rows["d"]["status"] == "labelled", "a newer failure takes nothing away"


def test_merged_tables_are_whole_valid_and_can_be_used(tmp_path: Path) -> None:
    outputs = [drop(tmp_path / str(n), *(image(f"{n}-{k}", 10 * n + k) for k in range(5))) for n in range(3)]

    merge(tmp_path / "all", *outputs)

    all_ = str(tmp_path / "all")
    for name, kind in (("images", schema.IMAGES), ("instances", schema.INSTANCES)):
        [path] = (tmp_path / "all" / name).glob("*.parquet")
        assert pq.read_schema(path).remove_metadata() == kind
    code, _, err = run("validate", "--output", all_, "--all-masks")
    assert code == 0, err
    code, _, err = run("export", "coco", "--output", all_, "--to", str(tmp_path / "coco"))
    assert code == 0, err
    assert len(json.loads((tmp_path / "coco" / "instances.json").read_text())["annotations"]) == 15


def test_an_output_merged_with_a_later_drop_is_the_three_merged_at_once(tmp_path: Path) -> None:
    drops = [drop(tmp_path / str(n), image("a", n), image(f"b{n}", 20 + n)) for n in range(3)]

    merge(tmp_path / "two", *drops[:2])
    merge(tmp_path / "steps", str(tmp_path / "two"), drops[2])
    merge(tmp_path / "once", *drops)

    for name in ("images", "instances"):
        assert table(tmp_path / "steps", name) == table(tmp_path / "once", name)


def test_classes_that_contradict_are_numbered_anew_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monday = drop(tmp_path / "monday", image("a", 1, 2, categories=[(1, "cat"), (2, "dog")]))
    tuesday = drop(tmp_path / "tuesday", image("b", 3, 4, categories=[(1, "bird"), (2, "cat")]))

    said = merge(tmp_path / "all", monday, tuesday)

    found = {(row["category_id"], row["category_name"]) for row in table(tmp_path / "all", "instances")}
    assert found == {(1, "bird"), (2, "cat"), (3, "dog")}
    assert said["classes_renumbered"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_merge_wants_two_outputs_and_an_empty_place(tmp_path: Path, number: int) -> None:
    monday = drop(tmp_path / "monday", image("a", 1))
    to = [tmp_path / "all", tmp_path / "monday"][number]
    more = [[], ["--merge", monday]][number]

    code, _, err = run("publish", "--output", str(to), "--merge", monday, *more)

    assert code == 2
    assert ["two outputs or more", "is not empty"][number] in err


def test_outputs_named_without_merge_are_wrong_usage(tmp_path: Path) -> None:
    code, _, err = run("publish", str(tmp_path / "out"), str(tmp_path / "monday"))

    assert code == 2
    assert "--merge" in err


def test_merged_tables_without_a_manifest_get_one_from_their_parts(tmp_path: Path) -> None:
    outputs = [drop(tmp_path / str(n), *(image(f"{n}-{k}", 10 * n + k) for k in range(5))) for n in range(2)]
    merge(tmp_path / "all", *outputs)
    (tmp_path / "all" / "manifest.json").write_text("{")
    code, _, err = run("validate", "--output", str(tmp_path / "all"))
    assert code == 6
    assert "`hqlabel publish` makes it again" in err
    code, _, err = run("publish", "--output", str(tmp_path / "all"))
    assert code == 0, err
    code, _, err = run("validate", "--output", str(tmp_path / "all"))
    assert code == 0, err
    (tmp_path / "all" / "instances" / "part-00000.parquet").unlink()
    code, _, err = run("publish", "--output", str(tmp_path / "all"))
    assert code == 6
    assert "merge the outputs again into another folder" in err


def test_a_merged_output_cannot_be_marked_anew(tmp_path: Path) -> None:
    outputs = [drop(tmp_path / str(n), image(f"{n}", n)) for n in range(2)]
    merge(tmp_path / "all", *outputs)

    code, _, err = run("publish", "--min-predicted-iou", "0.9", "--output", str(tmp_path / "all"))

    assert code == 4
    assert "cannot be marked anew" in err


def classes_by_image(output: Path) -> dict[str, tuple[int | None, str | None]]:
    return {row["image_id"]: (row["category_id"], row["category_name"]) for row in table(output, "instances")}


@pytest.mark.parametrize(
    ("monday", "tuesday", "merged"),
    [
        ([(0, None), (4, None)], [(0, None)], [(0, None), (4, None), (0, None)]),
        ([(0, None), (4, None)], [(0, "zero")], [(0, "zero"), (4, None), (0, "zero")]),
        ([(1, "cat"), (1, None)], [(1, "dog")], [(1, "cat"), (1, "cat"), (2, "dog")]),
        ([(1, "cat"), (None, "cat")], [(1, "dog")], [(1, "cat"), (1, "cat"), (2, "dog")]),
        ([(0, "cat"), (None, "bus")], [(None, None)], [(0, "cat"), (None, "bus"), (None, None)]),
    ],
)
def test_classes_that_rows_or_outputs_name_in_part_are_one_class_and_can_be_exported(
    monday, tuesday, merged, tmp_path: Path
) -> None:
    drops = [
        drop(tmp_path / day, *(image(f"{day}-{n}", n, categories=[kind]) for n, kind in enumerate(kinds)))
        for day, kinds in (("monday", monday), ("tuesday", tuesday))
    ]

    merge(tmp_path / "all", *drops)

    assert list(classes_by_image(tmp_path / "all").values()) == merged
    code, _, err = run("export", "coco", "--output", str(tmp_path / "all"), "--to", str(tmp_path / "coco"))
    assert code == 0, err
    coco = json.loads((tmp_path / "coco" / "instances.json").read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    assert [names[one["category_id"]] for one in coco["annotations"]] == [
        name or ("object" if number is None else str(number)) for number, name in merged
    ]


def test_boxes_without_a_mask_and_empty_masks_are_merged_and_valid(tmp_path: Path) -> None:
    nothing = np.zeros((60, 80), np.uint8)
    crowd = image("a", 1, 2, crowds=[True, False])
    empty = MadeImage(
        image_id="b",
        masks=[nothing, blob(3)],
        boxes=[[1, 1, 9, 9], [9, 9, 3, 3]],
        categories=[(1, "cat")] * 2,
    )
    drops = [drop(tmp_path / "one", crowd), drop(tmp_path / "two", empty)]

    merge(tmp_path / "all", *drops)

    rows = table(tmp_path / "all", "instances")
    assert rows == [*table(drops[0], "instances"), *table(drops[1], "instances")]
    assert [row["reject_reason"] for row in rows] == ["crowd", None, "empty", "box_inverted"]
    assert run("validate", "--output", str(tmp_path / "all"), "--all-masks")[0] == 0
