"""One small data set, written in every format that is read: the same pictures and boxes each time."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hqlabel.pipeline.settings import InputSettings
from tests.pipeline.made_jobs import noise, png

SIZE_HW = (48, 64)
NAMES = ["cat", "dog", "red car"]
Box = tuple[int, tuple[float, float, float, float], float]  # class from 0, x1 y1 x2 y2, score

# Boxes on a grid of 1/64 of the width and 1/48 of the height: exact as shares and as pixels.
BOXES: dict[str, list[Box]] = {
    "a/1": [(0, (4, 6, 20, 30), 0.5), (2, (8, 12, 40, 36), 0.25)],
    "a/2": [],
    "b/3": [(1, (16, 12, 48, 24), 0.75)],
    "b/4": [(2, (0, 0, 64, 48), 1.0), (2, (32, 24, 64, 48), 0.125)],
}
PICTURES = {name: png(noise(seed, *SIZE_HW)) for seed, name in enumerate(BOXES)}


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a format is asked for. `first_class`: the number that its first class has."""

    settings: InputSettings
    first_class: int = 0


def xywh(box: Box) -> list[float]:
    x1, y1, x2, y2 = box[1]
    return [x1, y1, x2 - x1, y2 - y1]


def shares(box: Box) -> tuple[float, float, float, float]:
    """x, y, width, height as shares of the picture."""
    x, y, width, height = xywh(box)
    return x / SIZE_HW[1], y / SIZE_HW[0], width / SIZE_HW[1], height / SIZE_HW[0]


def write_pictures(folder: Path) -> str:
    for name, data in PICTURES.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def write_table(folder: Path) -> Written:
    images = write_pictures(folder / "images")
    rows = [
        {
            "image_id": f"{name}.png",
            "boxes": [list(box[1]) for box in boxes],
            "labels": [box[0] for box in boxes],
            "scores": [box[2] for box in boxes],
        }
        for name, boxes in BOXES.items()
    ]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Written(settings=InputSettings(images=images, boxes=str(folder / "boxes.jsonl")))


def write_parquet(folder: Path) -> Written:
    """One row an image, with numbers of other widths than those that are used inside."""
    images = write_pictures(folder / "images")
    columns = {
        "image_uri": pa.array([f"images/{name}.png" for name in BOXES]),
        "boxes": pa.array(
            [[box[1] for box in boxes] for boxes in BOXES.values()], pa.list_(pa.list_(pa.float32(), 4))
        ),
        "labels": pa.array([[box[0] for box in boxes] for boxes in BOXES.values()], pa.list_(pa.int16())),
        "scores": pa.array([[box[2] for box in boxes] for boxes in BOXES.values()], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "boxes.parquet")
    return Written(settings=InputSettings(images=images, boxes=str(folder / "boxes.parquet")))


def write_box_rows(folder: Path) -> Written:
    """One row a box, those of an image apart from each other."""
    images = write_pictures(folder / "images")
    rows = [
        (at, f"{name}.png,{','.join(map(str, box[1]))},{box[0]},{box[2]}")
        for name, boxes in BOXES.items()
        for at, box in enumerate(boxes)
    ]
    lines = [line for _, line in sorted(rows, key=lambda row: row[0])]
    (folder / "boxes.csv").write_text("image_id,x1,y1,x2,y2,category_id,score\n" + "\n".join(lines) + "\n")
    return Written(settings=InputSettings(images=images, boxes=str(folder / "boxes.csv")))


def write_coco_results(folder: Path) -> Written:
    """The boxes of the instances file as a detector's results; names and sizes stay there."""
    instances = write_coco(folder).settings.boxes
    coco = json.loads(Path(str(instances)).read_text())
    (folder / "results.json").write_text(json.dumps(coco.pop("annotations")))
    Path(str(instances)).write_text(json.dumps(coco))
    settings = InputSettings(
        images=instances, boxes=str(folder / "results.json"), image_root=str(folder / "images")
    )
    return Written(settings=settings)


def write_coco(folder: Path) -> Written:
    write_pictures(folder / "images")
    images = [
        {"id": name, "file_name": f"{name}.png", "height": SIZE_HW[0], "width": SIZE_HW[1]} for name in BOXES
    ]
    annotations = [
        {"image_id": name, "category_id": box[0], "bbox": xywh(box), "score": box[2]}
        for name, boxes in BOXES.items()
        for box in boxes
    ]
    categories = [{"id": at, "name": name} for at, name in enumerate(NAMES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(coco))
    settings = InputSettings(boxes=str(folder / "instances.json"), image_root=str(folder / "images"))
    return Written(settings=settings)


def write_yolo(folder: Path) -> Written:
    images = write_pictures(folder / "images")
    for name, boxes in BOXES.items():
        path = folder / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for box in boxes:
            x, y, width, height = shares(box)
            lines.append(f"{box[0]} {x + width / 2} {y + height / 2} {width} {height} {box[2]}\n")
        if lines or name == "a/2":
            path.write_text("".join(lines))
    (folder / "labels" / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return Written(settings=InputSettings(images=images, boxes=str(folder / "labels")))


def write_megadetector(folder: Path) -> Written:
    images = write_pictures(folder / "images")
    content = {
        "info": {"format_version": "1.4"},
        "images": [
            {
                "file": f"{name}.png",
                "detections": [
                    {"category": str(box[0] + 1), "conf": box[2], "bbox": list(shares(box))} for box in boxes
                ],
            }
            for name, boxes in BOXES.items()
        ],
        "detection_categories": {str(at): name for at, name in enumerate(NAMES, start=1)},
    }
    (folder / "md.json").write_text(json.dumps(content))
    settings = InputSettings(images=images, boxes=str(folder / "md.json"))
    return Written(settings=settings, first_class=1)


def tar_of(members: dict[str, bytes], *, kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def sample(name: str) -> dict[str, bytes]:
    """A picture and its boxes beside it, as WebDataset has them."""
    boxes = BOXES[name]
    beside = {
        "boxes": [list(box[1]) for box in boxes],
        "labels": [box[0] for box in boxes],
        "scores": [box[2] for box in boxes],
    }
    return {f"{name}.png": PICTURES[name], f"{name}.json": json.dumps(beside).encode(), f"{name}.cls": b"3"}


def write_tars(folder: Path) -> Written:
    shards = folder / "shards"
    shards.mkdir(parents=True)
    (shards / "0.tar").write_bytes(tar_of(sample("a/1") | sample("a/2"), kind=tarfile.GNU_FORMAT))
    (shards / "1.tar").write_bytes(tar_of(sample("b/3") | sample("b/4")))
    return Written(settings=InputSettings(images=str(shards), boxes=str(shards)))


def hf_rows(*, as_structs: bool = False) -> pa.Table:
    image = [{"bytes": PICTURES[name], "path": f"{name}.png"} for name in BOXES]
    objects = [
        {
            "bbox": [xywh(box) for box in boxes],
            "category": [box[0] for box in boxes],
            "score": [box[2] for box in boxes],
        }
        for boxes in BOXES.values()
    ]
    if as_structs:
        objects = [
            [
                dict(zip(one, values, strict=True))
                for values in zip(one["bbox"], one["category"], one["score"], strict=True)
            ]
            for one in objects
        ]
    label = {"_type": "ClassLabel", "names": NAMES}
    features = {"image": {"_type": "Image"}, "objects": {"feature": {"category": label}}}
    table = pa.table({"image": image, "objects": objects, "other": [1, 2, 3, 4]})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_hf(folder: Path, *, as_structs: bool = False) -> Written:
    data = folder / "data"
    data.mkdir(parents=True)
    rows = hf_rows(as_structs=as_structs)
    pq.write_table(rows.slice(0, 3), data / "train-0.parquet", row_group_size=2)
    pq.write_table(rows.slice(3), data / "train-1.parquet")
    return Written(settings=InputSettings(boxes=str(data)))


def write_hf_structs(folder: Path) -> Written:
    return write_hf(folder, as_structs=True)


FORMATS = {
    "table": write_table,
    "parquet": write_parquet,
    "box_rows": write_box_rows,
    "coco": write_coco,
    "coco_results": write_coco_results,
    "yolo": write_yolo,
    "megadetector": write_megadetector,
    "tars": write_tars,
    "hf": write_hf,
    "hf_structs": write_hf_structs,
}
