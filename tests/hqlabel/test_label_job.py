"""A job from Python: how it ends badly. How it ends well is the example in docs/python.md."""

from __future__ import annotations

from pathlib import Path

import pytest

import hqlabel
from hqlabel.pipeline.errors import UsageError


@pytest.mark.parametrize("quiet", [False, True])
def test_a_refused_job_raises_with_the_words_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    with pytest.raises(hqlabel.JobEnded, match=r"missing: there is no such file") as caught:
        hqlabel.label(images=tmp_path / "missing", output=tmp_path / "out", quiet=quiet)
    assert caught.value.exit_code == 4
    assert ("no such file" in capsys.readouterr().err) is not quiet
    assert not (tmp_path / "out").exists()


def test_a_setting_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.dtype.*found 'float8'"):
        hqlabel.label(images=tmp_path, output=tmp_path / "out", settings={"model.dtype": "float8"})
