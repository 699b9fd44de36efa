"""A detector on the command line: what is asked, what is said of it before any work, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from hqlabel.jobs.cli.options import parse_prompts
from hqlabel.jobs.job_setup.check_models import DEMO_RECORD, read_checkpoint
from hqlabel.jobs.job_setup.resolve_settings import box_rules, detector_settings, resolved
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.job_context import BoxRules
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output
from tests.model import made_detectors


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a", "b"):
        Image.new("RGB", (80, 60), (10, 200, 30)).save(folder / f"{name}.png")
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_detectors.small_rt_detr(tmp_path_factory.mktemp("detectors") / "rt")


def asked(**detector: object) -> Config:
    return ConfigSources(flags={f"detector.{name}": value for name, value in detector.items()}).load()


def test_prompts_are_words_parted_by_semicolons_or_a_map() -> None:
    assert parse_prompts("person; red car;") == {"person": "person", "red car": "red car"}
    assert parse_prompts(None) is None
    with pytest.raises(UsageError, match="separated by ';'"):
        parse_prompts(" ; ")
    config = ConfigSources(sets=["detector.prompts={a red car: vehicle}"]).load()
    assert config.detector.prompts == {"a red car": "vehicle"}


def test_prompts_go_with_zero_shot_detectors_alone() -> None:
    prompts = {"cat": "cat"}

    assert detector_settings(asked(name="hf-zero-shot:a/b", prompts=prompts)).prompts == prompts
    with pytest.raises(UsageError, match="--prompts are missing"):
        detector_settings(asked(name="hf-zero-shot:a/b"))
    with pytest.raises(UsageError, match="it takes no --prompts"):
        detector_settings(asked(name="hf:a/b", prompts=prompts))
    assert detector_settings(asked()) is None


def test_a_secret_among_a_detectors_options_is_refused() -> None:
    with pytest.raises(UsageError, match=r"detector\.options: option 'api_key' looks like a secret"):
        detector_settings(asked(name="mine:One", options={"api_key": "123"}))


def test_a_folder_becomes_absolute_for_workers_elsewhere(
    detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(detector.parent)

    assert detector_settings(asked(name="hf:rt")).name == f"hf:{detector}"
    assert resolved(asked(name="hf:rt")).detector.name == f"hf:{detector}"
    assert detector_settings(asked(name="hf:org/name")).name == "hf:org/name"


def test_every_rule_on_boxes_reaches_the_job() -> None:
    sets = [
        "boxes.min_score=0.2", "boxes.top_k=5", "boxes.nms_mode=class", "boxes.nms_iou=0.6",
        "boxes.min_side_px=4", "boxes.expand=0.1",
    ]  # fmt: skip
    config = ConfigSources(sets=sets).load()

    assert box_rules(config, "xywh", "stored") == BoxRules(
        box_format="xywh", box_frame="stored", min_score=0.2, top_k=5, nms_mode="class", nms_iou=0.6,
        min_side_px=4.0, expand=0.1,
    )  # fmt: skip
    assert box_rules(Config(), "xyxy", "upright") == BoxRules()


def test_plan_says_which_detector_under_which_licence_and_that_all_pictures_are_opened(
    photos: str, detector: Path
) -> None:
    code, out, err = run("plan", "--images", photos, "--detector", f"hf:{detector}")
    json_code, json_out, _ = run("plan", "--images", photos, "--detector", f"hf:{detector}", "--json")

    assert (code, json_code) == (0, 0), err
    assert "rt_detr_v2; 3 categories; fingerprint" in out
    assert "licence apache-2.0" in out
    assert "will not be opened" not in out
    said = json.loads(json_out)["detector"]
    assert said["settings"]["license"] == "apache-2.0"
    assert said["settings"]["fingerprint"] in out or said["settings"]["fingerprint"][:12] in out
    assert said["categories"][0] == {"id": 0, "name": "cat"}


def test_doctor_loads_and_tries_the_detector(detector: Path, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--no-ray", "--detector", f"hf:{detector}")
    broken_code, broken, _ = run("doctor", "--no-ray", "--detector", f"hf:{tmp_path}")

    assert code == 0
    assert "rt_detr_v2; 3 categories" in out
    assert broken_code == 4
    assert "no config.json" in broken


@pytest.mark.parametrize(
    ("kind", "make", "package"),
    [
        ("hf", made_detectors.small_rf_detr, "torchvision"),
        ("hf-zero-shot", made_detectors.small_omdet_turbo, "torchvision"),
        ("hf-zero-shot", made_detectors.small_owlv2, "scipy"),
    ],
)
def test_a_package_that_a_detector_wants_is_named_before_any_work(
    kind: str, make: Callable[[Path], Path], package: str, photos: str, tmp_path: Path
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    prompts = ["--prompts", "cat; red car"] if kind == "hf-zero-shot" else []

    code, _, err = run("plan", "--images", photos, "--detector", f"{kind}:{make(tmp_path / 'one')}", *prompts)

    assert code == 4
    assert package in err.lower()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--boxes", "b.csv", "--detector", "hf:a/b"], 2, "--boxes and --detector are both given"),
        (["--detector", "no.such:Class"], 4, "detector no.such:Class: ModuleNotFoundError"),
        (["--detector", "nonsense"], 4, "wanted hf:ID_OR_FOLDER"),
        (["--detector", "hf-zero-shot:a/b"], 2, "--prompts are missing"),
    ],
)
def test_what_does_not_go_together_is_refused(
    photos: str, arguments: list[str], code: int, said: str
) -> None:
    found, _, err = run("plan", "--images", photos, *arguments)

    assert found == code
    assert said in err


def test_a_plan_without_boxes_and_without_a_detector_says_that_no_mask_can_come(
    photos: str, detector: Path
) -> None:
    _, out, _ = run("plan", "--images", photos)
    _, detected, _ = run("plan", "--images", photos, "--detector", f"hf:{detector}")

    assert "warning: no image has a box, so there will be no mask; say with --boxes where they are" in out
    assert "warning" not in detected


@pytest.mark.parametrize(("flags", "warned"), [((1, 1), True), ((1, 0), False), ((), False)])
def test_a_plan_of_crowds_alone_says_that_no_mask_can_come(
    photos: str, tmp_path: Path, flags: tuple[int, ...], warned: bool
) -> None:
    """As annotation tools write COCO for masks that were drawn with a brush."""
    rows = "".join(f"{next(Path(photos).iterdir()).name},1,1,9,9,{flag}\n" for flag in flags)
    (tmp_path / "boxes.csv").write_text(f"image_uri,x1,y1,x2,y2,iscrowd\n{rows}")

    code, out, _ = run("plan", "--images", photos, "--boxes", str(tmp_path / "boxes.csv"))

    assert code == 0
    assert ("warning: every box is a crowd (iscrowd 1), so there will be no mask" in out) == warned


def test_a_detector_needs_pictures(tmp_path: Path) -> None:
    code, _, err = run("plan", "--detector", "hf:a/b")

    assert code == 2
    assert "--images is missing: a detector needs pictures" in err


def test_code_that_an_output_names_is_not_run_unless_it_is_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(1)])])
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Detector: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (Path(output) / "config.yaml").write_text("detector: {name: 'evil:Detector'}\ninput: {images: photos}\n")

    code, _, err = run("retry", "--output", output, "--checkpoint", "demo")

    assert code == 4
    assert "the job began with" in err
    job = json.loads((Path(output) / "job.json").read_text())
    job["context"] |= {"detector": {"name": "evil:Detector", "fingerprint": "f"}}
    job["context"]["weights"]["sha256"] = load(DEMO_FOLDER).weights.sha256
    (Path(output) / "job.json").write_text(json.dumps(job))
    code, _, err = run("retry", "--output", output, "--checkpoint", "demo")
    assert code == 2
    assert "'evil:Detector', is never taken from an output: name it again" in err
    assert not (tmp_path / "ran").exists()


def test_the_demo_checkpoints_record_is_what_its_file_holds() -> None:
    loaded = load(DEMO_FOLDER)
    held = (loaded.weights.sha256, loaded.weights.license, loaded.weights.architecture)
    assert held == (DEMO_RECORD.sha256, DEMO_RECORD.license, DEMO_RECORD.architecture)
    assert (loaded.model.config.image_size, loaded.model.fit) == (DEMO_RECORD.input_side, DEMO_RECORD.fit)
    assert not loaded.weights.warnings
    assert read_checkpoint(Config.model_validate({"model": {"checkpoint": "demo"}})) == DEMO_RECORD
