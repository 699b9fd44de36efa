"""docs/errors.md is the code's own list, no more and no less."""

from __future__ import annotations

from pathlib import Path

from hqlabel.pipeline import errors
from tests.docs.markdown import column, section, table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text()


def test_every_image_code_is_on_the_page_with_stage_and_meaning() -> None:
    rows = table(section(PAGE, "Image codes"))

    assert {row["code"]: (row["stage"], row["meaning"]) for row in rows} == errors.IMAGE_CODES


def test_every_box_code_is_on_the_page_with_its_meaning() -> None:
    rows = table(section(PAGE, "Box codes"))

    assert {row["code"]: row["meaning"] for row in rows} == errors.BOX_CODES


def test_every_systemic_code_is_on_the_page_with_its_meaning() -> None:
    rows = table(section(PAGE, "Systemic codes"))

    assert {row["code"]: row["meaning"] for row in rows} == errors.SYSTEMIC_CODES


def test_every_code_has_advice() -> None:
    for heading in ("Image codes", "Box codes", "Systemic codes"):
        assert all(row["what to do"] for row in table(section(PAGE, heading)))


def test_the_exit_codes_of_the_error_types_are_on_the_page() -> None:
    listed = {int(code) for code in column(table(section(PAGE, "Exit codes")), "code")}
    types = (
        errors.HqlabelError,
        errors.UsageError,
        errors.JobRefused,
        errors.SystemicFault,
        errors.DamageFound,
    )

    assert {kind.exit_code for kind in types} <= listed
    assert listed == {0, 1, 2, 3, 4, 5, 6, 130}
