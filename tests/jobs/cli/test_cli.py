"""The command line: what is said, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

from hqlabel.jobs.cli import main as cli
from hqlabel.jobs.job_setup.check_models import read_checkpoint
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal.input_report import describe_model
from hqlabel.pipeline.errors import DamageFound, JobRefused, SystemicFault, UsageError
from tests.e2e import commands
from tests.e2e.scenes import DataSet

ROOT = Path(__file__).parents[3]
NO_OPTIONS = {"config": None, "set": None, "json": False, "verbose": False}
COMMANDS = (
    "label",
    "plan",
    "status",
    "retry",
    "publish",
    "validate",
    "inspect",
    "clean",
    "doctor",
    "evaluate",
)


def run(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    done = commands.run_here(*arguments, code=None)
    return done.returncode, done.stdout, done.stderr


def test_help_lists_every_command_and_how_to_begin() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(re.search(rf"│ {name} ", out) for name in COMMANDS)
    assert "hqlabel label --images" in out
    assert "Exit codes" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_and_its_first_sentence_whole(name: str) -> None:
    _, overview, _ = run("--help")
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"Example:  hqlabel {name}" in out
    first = next(line.strip() for line in out.splitlines() if line.strip() and "Usage" not in line)
    assert first.rstrip(" ") in overview


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["label", "--imges", "x"], "No such option"),
        (["label", "--limit", "0"], "--limit"),
        (
            ["label", "--images", "p/a.jpg", "p/b.jpg", "p/c.jpg", "--output", "/o"],
            "p/b.jpg and 1 more: no flag",
        ),
        (["plan", "--images", "p/a.jpg", "p/b.jpg"], "a pattern of files goes in quotes"),
        (["label"], "--output is missing"),
        (["label", "--output", "/nowhere/out"], "--images and --boxes are missing"),
        (["label", "--images", "/x", "--output", "/nowhere/out"], "--checkpoint is missing"),
        (["label", "--slice", "3/2", "--output", "/nowhere/out"], "--slice 3/2: wanted i/n"),
        (["label", "--set", "outptu.uri=x"], "no such name"),
        (["label", "--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["label", "--box-format", "xyzw", "--output", "/o"], "input.box_format"),
        (
            ["label", "--ray-address", "ray://h:1", "--images", "/x", "--output", "/nowhere/o"],
            "ray job submit",
        ),
        (["status"], "--output is missing"),
        (
            ["retry", "--output", "/o", "--code", "nonsense"],
            "--code nonsense: no such code; known: uri_refused",
        ),
        (["publish", "--output", "/o", "--min-predicted-iou", "3"], "filter.min_predicted_iou"),
        (["inspect"], "image_id"),
    ],
)
def test_wrong_usage_is_2_with_a_sentence_that_names_it(arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2, err
    assert said.lower() in err.lower()
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("name", ["status", "publish", "validate", "clean", "retry"])
def test_an_output_without_a_job_is_refused(name: str, tmp_path: Path) -> None:
    code, out, err = run(name, "--output", str(tmp_path / "out"))
    assert code == 4
    assert err.startswith(f"hqlabel: {tmp_path}/out: there is no job here")
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_dangerous_environment_is_refused_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    code, _, err = run("status", "--output", "/o")
    assert code == 4
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("a wrong flag"), 2, "hqlabel: a wrong flag\n"),
        (JobRefused("another job"), 4, "hqlabel: another job\n"),
        (SystemicFault("disk", "full"), 5, "hqlabel: disk: full\n"),
        (DamageFound("a flipped bit"), 6, "hqlabel: a flipped bit\n"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_every_kind_of_error_has_its_exit_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.command()
    def fail(given: ConfigSources, json: bool) -> int:
        raise error

    with pytest.raises(typer.Exit) as caught:
        fail(**NO_OPTIONS)
    assert caught.value.exit_code == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert ("Traceback" in shown.err) == (code == 1)
    assert ("goes on from there" in shown.err) == (code == 5)


def test_verbose_shows_where_an_error_arose(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.command()
    def fail(given: ConfigSources, json: bool) -> int:
        raise JobRefused("another job")

    with pytest.raises(typer.Exit):
        fail(**NO_OPTIONS | {"verbose": True})
    assert "Traceback" in capsys.readouterr().err


def test_python_m_jobs_is_the_same_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hqlabel", "label", "--set", "a"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "hqlabel: --set 'a': wanted name=value, such as --set model.dtype=float32\n"


def test_doctor_looks_at_versions_weights_and_the_output(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    code, out, _ = run(
        "doctor", "--no-ray", "--output", str(output), "--checkpoint", str(checkpoint), "--json"
    )
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0, out
    assert findings["pyarrow"]["state"] == "ok"
    assert "input side 128" in findings["checkpoint"]["text"]
    assert "write once, read, list work" in findings["output"]["text"]
    assert not output.exists()


def test_keys_of_a_config_that_are_not_known_are_told_wherever_the_weights_are_described(
    tmp_path: Path, checkpoint: Path, data_set: DataSet
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "newer")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "use_cache": True, "\x1b[1mbold": 1}))
    known, newer = ("--checkpoint", str(checkpoint)), ("--checkpoint", str(folder))
    inputs = ("--images", str(data_set.images), "--boxes", str(data_set.boxes))
    said = "config.json: \\x1b[1mbold, use_cache: not known here, not followed"

    code, out, _ = run("doctor", "--no-ray", *newer)
    assert code == 0
    assert re.search(rf"note +checkpoint .*{re.escape(said)}", out)
    assert said in run("plan", *inputs, *newer)[1]
    for quiet in (run("doctor", "--no-ray", *known), run("plan", *inputs, *known)):
        assert "not known here" not in quiet[1]
    weights = read_checkpoint(Config.model_validate({"model": {"checkpoint": str(folder)}}))
    rows = describe_model(
        SimpleNamespace(weights=weights, model=SimpleNamespace(dtype="float32")), asked_dtype="auto"
    )
    assert rows[-1] == ("", said)


def test_a_licence_out_of_a_file_is_printed_as_plain_text(checkpoint: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"license": "\x1b[1mMIT\nor so"})

    assert (
        r"licence \x1b[1mMIT\nor so"
        in run("doctor", "--no-ray", "--checkpoint", f"{tmp_path}/a.safetensors")[1]
    )


def test_a_checkpoint_that_is_more_than_tensors_is_refused_in_one_line_of_plain_text(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "args": Namespace(lr=1)}, tmp_path / "mid.pth")
    code, out, _ = run("doctor", "--no-ray", "--checkpoint", str(tmp_path / "mid.pth"))
    [line] = [line for line in out.splitlines() if "checkpoint" in line]

    assert code == 4
    assert f"FAIL  checkpoint          --checkpoint {tmp_path}/mid.pth: not a file of plain tensors" in line
    assert "argparse.Namespace" in line
    assert "torch.save(model.state_dict(), 'sam_hq.pth')" in line
    assert "x1b" not in line


def test_doctor_names_what_would_stop_a_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "out")
    code, out, err = run("doctor", "--no-ray", "--output", place, "--checkpoint", str(tmp_path / "file"))
    assert code == 4
    assert re.search(r"FAIL +checkpoint .*neither a .pth nor a safetensors file", out)
    assert re.search(r"FAIL +output .*Not a directory", out)
    assert "2 problems found" in err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_doctor_sees_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, out, _ = run("doctor", "--no-ray", "--output", str(tmp_path / "out"))
    assert code == 4
    assert "FAIL  output" in out


def test_the_help_of_label_fits_a_screen_and_has_the_rest_below() -> None:
    narrow = {"COLUMNS": "80", "NO_COLOR": "1", "TERMINAL_WIDTH": "80"}
    brief = CliRunner().invoke(cli.app, ["label", "--help"], env=narrow).stdout
    whole = CliRunner().invoke(cli.app, ["label", "--help-all"], env=narrow).stdout
    assert len(brief.splitlines()) <= 50
    assert max(map(len, brief.splitlines())) <= 80
    assert brief.count("Example:") == 3
    for name in ("--slice", "--ray-address", "--box-format", "--check-inputs"):
        assert name in whole
        assert name not in brief


def test_common_settings_are_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("hqlabel.jobs.commands.label.run", lambda config, *_: seen.append(config) or 0)
    flags = ["--device", "cpu", "--dtype", "float32", "--batch", "4", "--min-score", "0.25", "--workers", "3"]
    assert run("label", *flags)[0] == 0
    [config] = seen
    assert (config.cluster.gpus_per_actor, config.cluster.actors) == (0, 3)
    assert (config.model.dtype, config.model.images_per_call) == ("float32", 4)
    assert config.boxes.min_score == 0.25
    assert run("label", "--device", "cuda")[0] == 0
    assert seen[-1].cluster.gpus_per_actor == 1
    code, _, err = run("label", "--device", "tpu")
    assert code == 2
    assert "--device tpu: wanted cpu or cuda" in err


def test_the_printed_configuration_is_the_defaults_and_every_line_of_it_can_be_taken(tmp_path: Path) -> None:
    code, out, _ = run("config")
    path = tmp_path / "job.yaml"
    path.write_text(out)
    assert code == 0
    assert ConfigSources(path=str(path)).load() == Config()
    names = ConfigSources(path=str(path)).load().model_dump()
    taken = re.sub(r"^( *)# (?=[a-z_0-9]+: \S*$)", r"\1", out, flags=re.MULTILINE)
    assert taken.count("\n  images: null") == 1
    path.write_text(taken)
    assert ConfigSources(path=str(path)).load().model_dump() == names
    settings = {name for section in names.values() if isinstance(section, dict) for name in section}
    assert all(f"# {name}: " in out for name in settings)


def test_the_output_is_a_word_of_every_command_that_reads_it(tmp_path: Path) -> None:
    out, place = str(tmp_path / "out"), str(tmp_path / "new")
    commands = [
        ["status", out],
        ["validate", out],
        ["report", out],
        ["clean", out],
        ["publish", out],
        ["retry", out],
        ["evaluate", out, "--truth", "t.json"],
        ["inspect", out, "a.jpg"],
        ["export", "coco", out, place],
        ["export", "coco", out, "--to", place],
        ["export", "coco", place, "--output", out],
    ]
    for command in commands:
        code, _, err = run(*command)
        assert (code, err.startswith(f"hqlabel: {out}: there is no job here")) == (4, True), (command, err)
    code, _, err = run("status", out, "--output", place)
    assert code == 2
    assert "name two outputs" in err
    for command in (["export", "coco", out], ["export", "coco", out, place, "more"]):
        assert "wanted FORMAT OUTPUT PLACE" in run(*command)[2]
