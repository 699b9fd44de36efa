"""Tables as detectors and annotation tools write them: what is read without a word of the user, and what not.

Headers as of YOLOv5's `results.pandas()`, ultralytics' `to_csv`, supervision's CSVSink, TensorFlow's and
Pascal VOC's `xml_to_csv`, Open Images, torchvision, Grounding DINO and a few of Kaggle.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal.input_report import describe_inputs
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import InputSettings

CORNERS = [10.0, 20.0, 110.0, 220.0]
READ: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tensorflow": (
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,600,400,cat,10,20,110,220\n",
        (CORNERS, 1, "cat", None),
    ),
    "yolov5": (
        ",image,xmin,ymin,xmax,ymax,confidence,class,name\n0,a.jpg,10,20,110,220,0.9,15,cat\n",
        (CORNERS, 15, "cat", 0.9),
    ),
    "supervision": (
        "x_min,y_min,x_max,y_max,class_id,confidence,tracker_id,class_name,file_name\n"
        "10,20,110,220,15,0.9,,cat,a.jpg\n",
        (CORNERS, 15, "cat", 0.9),
    ),
    "ultralytics, as Python prints": (
        "name,class,confidence,box,filename\n"
        "cat,15,0.9,\"{'x1': 10.0, 'y1': 20.0, 'x2': 110.0, 'y2': 220.0}\",a.jpg\n",
        (CORNERS, 15, "cat", 0.9),
    ),
    "ultralytics, as JSON": (
        "name,class,confidence,box,filename\n"
        'cat,15,0.9,"{""x1"":10,""y1"":20,""x2"":110,""y2"":220}",a.jpg\n',
        (CORNERS, 15, "cat", 0.9),
    ),
    "torchvision": (
        'image_path,boxes,labels,scores\na.jpg,"[[10,20,110,220]]",[1],[0.9]\n',
        (CORNERS, 1, None, 0.9),
    ),
    "retinanet": ("path,x1,y1,x2,y2,class_name\na.jpg,10,20,110,220,cat\n", (CORNERS, 1, "cat", None)),
    "sides": ("image,left,top,right,bottom,label\na.jpg,10,20,110,220,cat\n", (CORNERS, 1, "cat", None)),
    "left and widths": (
        "Image Name,Left,Top,Width,Height,Category,Prob\na.jpg,10,20,100,200,cat,.5\n",
        ([10.0, 20.0, 100.0, 200.0], 1, "cat", 0.5),
    ),
    "numbers beside words": (
        "image_uri,x1,y1,x2,y2,label,class_id\na.jpg,10,20,110,220,cat,7\n",
        (CORNERS, 7, "cat", None),
    ),
    "both kinds of boxes, the same": (
        'file_name,bbox,xmin,ymin,xmax,ymax\na.jpg,"[10,20,110,220]",10,20,110.4,220\n',
        (CORNERS, None, None, None),
    ),
}
REFUSED: dict[str, tuple[str, list[str]]] = {
    "two names of the image": (
        "filename,path,xmin,ymin,xmax,ymax\na.jpg,b.jpg,10,20,110,220\n",
        ["'filename' or 'path' could be image_uri", "x1: xmin", "image_uri: path"],
    ),
    "two names that are rarely used": (
        "image_filename,img_filename,xmin,ymin,xmax,ymax,phrase,text_label\na.jpg,b.jpg,1,2,30,40,x,y\n",
        ["'image_filename' or 'img_filename'", "image_uri: image_filename", "label: phrase"],
    ),
    "two scores": (
        "filename,xmin,ymin,xmax,ymax,conf,prob\na.jpg,10,20,110,220,1,1\n",
        [
            "'conf' or 'prob' could be score",
            "--set input.columns.score=conf; to read none of them: --set 'input.columns={score: \"\"}'",
        ],
    ),
    "two columns of words": (
        "filename,xmin,ymin,xmax,ymax,class,name\na.jpg,10,20,110,220,cat,Tom\n",
        ["'class' or 'name' could be label"],
    ),
    "two kinds of corners": (
        "filename,xmin,ymin,xmax,ymax,left,top,right,bottom\na.jpg,1,2,30,40,1,2,30,41\n",
        ["xmin, ymin, xmax, ymax or left, top, right, bottom could be the boxes"],
    ),
    "two kinds of boxes that differ": (
        'filename,bbox,xmin,ymin,xmax,ymax\na.jpg,"[1,2,30,40]",10,20,110,220\n',
        ["the boxes are there twice", "--set input.columns.bbox=bbox", "x1: xmin"],
    ),
    "boxes of COCO beside corners": (
        'filename,bbox,xmin,ymin,xmax,ymax\na.jpg,"[10,20,100,200]",10,20,110,220\n',
        ["differs from xmin, ymin, xmax, ymax", "as xywh it does not: --box-format xywh"],
    ),
    "corner or centre": (
        "image_path,x,y,w,h\na.jpg,10,20,110,220\n",
        ["x and y may be a corner (--box-format xywh) or the centre (cxcywh)"],
    ),
    "widths of the box or of the picture": (
        "filename,width,height,xmin,ymin\na.jpg,600,400,10,20\n",
        ["width and height may be the box's (--box-format xywh) or the picture's"],
    ),
    "a list without a format": (
        'filename,bounding_box\na.jpg,"[10,20,100,200]"\n',
        ["how the four numbers of 'bounding_box' are meant is not stated", "--box-format xyxy"],
    ),
    "everything at once": (
        "filename,path,x,y,w,h,conf,prob\na.jpg,b,1,2,3,4,.5,.6\n",
        ["'filename' or 'path'", "'conf' or 'prob'", "corner", "--box-format xywh", "score: conf"],
    ),
    "open images": (
        "ImageID,LabelName,Confidence,XMin,XMax,YMin,YMax\na.jpg,/m/01,1,0.1,0.4,0.2,0.6\n",
        ["100% of the boxes lie within 0 to 1", "--box-format xyxy-normalised"],
    ),
    "grounding dino": (
        'image_path,boxes,logits,phrases\na.jpg,"[[0.5,0.5,0.2,0.3]]",[0.9],"[\'cat\']"\n',
        ["100% of the boxes lie within 0 to 1", "centre first: cxcywh-normalised"],
    ),
    "shares in columns of ours": ("image_uri,x1,y1,x2,y2\na.jpg,0.1,0.1,0.5,0.5\n", ["xyxy-normalised"]),
    "a corner is missing": ("filename,xmin,ymin,xmax\na.jpg,1,2,3\n", ["nothing is called like y2"]),
}


def written(folder: Path, content: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(content)
    images = json.dumps({"image_id": "a.jpg", "image_uri": "a.jpg"})
    (folder / "images.jsonl").write_text(images)
    return folder / name


def planned(path: Path, **settings: Any) -> Plan:
    images = str(path.with_name("images.jsonl")) if path.read_bytes().startswith(b"ImageID") else None
    return make_plan(InputSettings(boxes=str(path), images=images, **settings))


def boxes_of(plan: Plan) -> list[tuple[Any, ...]]:
    names = ("given", "category_id", "category_name", "score")
    return [tuple(box[n] for n in names) for row in plan.table.to_pylist() for box in row["boxes"]]


def report(path: Path, plan: Plan) -> dict[str, str]:
    config = ConfigSources(flags={"input.boxes": str(path)}).load()
    lines = describe_inputs(config, asdict(plan.summary))
    return {name or text.partition(":")[0]: text for name, text in lines}


@pytest.mark.parametrize("tool", READ)
def test_tables_of_tools_are_read_and_every_column_is_said(tmp_path: Path, tool: str) -> None:
    content, box = READ[tool]
    path = written(tmp_path, content)

    plan = planned(path)

    assert [box] == boxes_of(plan)
    lines = report(path, plan)
    said = lines["columns used"] + lines.get("columns not used", "")
    names = [name for name in content.partition("\n")[0].split(",") if name]
    assert [] == [name for name in names if name not in said]


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_could_be_meant_in_two_ways_is_refused_in_one_message(tmp_path: Path, mistake: str) -> None:
    content, parts = REFUSED[mistake]

    with pytest.raises(JobRefused) as caught:
        planned(written(tmp_path, content))

    assert [] == [part for part in parts if part not in str(caught.value)]


def test_a_stated_format_settles_what_names_leave_open(tmp_path: Path) -> None:
    for content in (REFUSED[name][0] for name in ("corner or centre", "a list without a format")):
        plan = planned(written(tmp_path, content), box_format="cxcywh")
        assert [10.0, 20.0] == boxes_of(plan)[0][0][:2]
        assert "cxcywh" == plan.summary.box_format
    shares = written(tmp_path, REFUSED["open images"][0])
    assert [[0.1, 0.2, 0.4, 0.6]] == [
        box[0] for box in boxes_of(planned(shares, box_format="xyxy-normalised"))
    ]
    assert 1 == planned(shares, box_format="xyxy").summary.boxes  # pixels, if somebody says so


def test_boxes_of_named_corners_are_read_from_json_lines_and_parquet(tmp_path: Path) -> None:
    box = {"x1": 10.0, "y1": 20.0, "x2": 110.0, "y2": 220.0}
    rows = [{"file_name": "a.jpg", "box": box}, {"file_name": "b.jpg", "box": {**box, "x2": None}}]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)), "t.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")

    for one in (path, tmp_path / "t.parquet"):
        assert [CORNERS, [10.0, 20.0, None, 220.0]] == [found[0] for found in boxes_of(planned(one))]


def test_all_columns_of_other_types_are_named_at_once(tmp_path: Path) -> None:
    columns = {"image_uri": ["a"], "bbox": ["text"], "score": ["high"], "label": [[1]]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")

    with pytest.raises(JobRefused) as caught:
        planned(tmp_path / "t.parquet")

    assert [] == [name for name in ("'bbox'", "'score'", "'label'") if name not in str(caught.value)]


def test_classes_and_scores_are_counted_before_work(tmp_path: Path) -> None:
    lines = [f"a.jpg,0,0,9,9,c{i % 12:02},0.{i + 10}" for i in range(30)]
    path = written(tmp_path, "file,x1,y1,x2,y2,class,conf\n" + "\n".join([*lines, "a.jpg,0,0,9,9,,"]) + "\n")

    shown = report(path, planned(path))

    assert shown["classes"].startswith("c00 3, c01 3, c02 3, c03 3, c04 3, c05 3, c06 2")
    assert shown["classes"].endswith("and 2 more classes; 1 box without a class")
    assert "0.1 to 0.39; 1 box without a score" == shown["scores"]
    for odd in ("inf", "-inf", "1e999", "nan"):
        path = written(tmp_path, f"file,x1,y1,x2,y2,conf\na.jpg,0,0,9,9,{odd}\na.jpg,0,0,9,8,0.5\n")
        assert "0.5 to 0.5; 1 box without a score" == report(path, planned(path))["scores"], odd
        json.dumps(asdict(planned(path).summary), allow_nan=False)  # job.json holds it
    bare = written(tmp_path, "file,x1,y1,x2,y2\na.jpg,0,0,9,9\n")
    assert "none given; no scores given" == report(bare, planned(bare))["classes"]
