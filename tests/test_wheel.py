"""The wheel in an environment and a folder that have their own `model`, `pipeline` and `jobs`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("model", "pipeline", "jobs")
SOURCES = (*NAMES, "hqlabel", "pyproject.toml", "README.md", "LICENSE")
FOREIGN = "raise RuntimeError('somebody else')\n"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=200)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves a build folder next to the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def foreign(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with packages of the same names, into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in NAMES:
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(FOREIGN)
    (packages / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--ignore-installed")
    pip("--python", python, "install", *options, wheel)
    return python


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to type commands in, with files of the same names."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    return tmp_path


def run(folder: Path, *command: str | Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environ, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_one_package_with_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"hqlabel"}
    listed = subprocess.run(
        ["git", "ls-files", *NAMES], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split("\n")
    assert {f"hqlabel/{path}" for path in listed if path} <= set(names)


def test_packages_of_the_same_names_stay_as_they_were(foreign: Path) -> None:
    for name in NAMES:
        (path,) = foreign.parents[1].glob(f"lib/python*/site-packages/{name}")
        assert [one.name for one in path.iterdir()] == ["__init__.py"]
        assert (path / "__init__.py").read_text() == FOREIGN


def test_commands_run_next_to_files_of_the_same_names(foreign: Path, folder: Path) -> None:
    where = run(folder, foreign, "-c", "import hqlabel.jobs, os; print(os.path.realpath(hqlabel.__file__))")
    assert str(foreign.parents[1].resolve()) in where
    assert "label" in run(folder, foreign.parent / "hqlabel", "--help")
    assert "label" in run(folder, foreign, "-m", "hqlabel", "--help")
    shutil.copy(ROOT / "examples" / "photos" / "cat.jpg", folder)
    (folder / "boxes.csv").write_text("image_uri,x1,y1,x2,y2\ncat.jpg,50,20,400,290\n")
    command = ("--images", ".", "--boxes", "boxes.csv", "--checkpoint", "demo")
    assert "1 image" in run(folder, foreign.parent / "hqlabel", "plan", *command)


@pytest.mark.faults
def test_ray_workers_find_the_installed_package(foreign: Path, folder: Path) -> None:
    shutil.copy(ROOT / "examples" / "photos" / "cat.jpg", folder)
    (folder / "boxes.csv").write_text("image_uri,x1,y1,x2,y2\ncat.jpg,50,20,400,290\n")
    command = ("--images", ".", "--boxes", "boxes.csv", "--checkpoint", "demo", "--output", "out")
    run(folder, foreign.parent / "hqlabel", "label", *command)
    assert list((folder / "out").glob("instances/*.parquet"))
