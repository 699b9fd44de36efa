"""What a worker writes of its work: JSON lines with run, unit and image, without credentials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hqlabel.pipeline.storage.uri_rules import without_credentials

ROOT = Path(__file__).resolve().parents[3]

WORKER = """
    import logging, sys
    from hqlabel.pipeline.worker import logs
    logs.event("unit_committed", unit_id=1)   # before: nobody keeps it
    logs.keep_in_this_process()
    logs.keep_in_this_process()
    logs.event("unit_committed", run_id="r", unit_id=7, failed_by_code={"empty": 1})
    logs.image_failed("r", 7, 'a"\\n\\x1b[2J.jpg', "truncated", "ends early")
    logs.image_failed("r", 7, "https://me:secret@host/a.jpg", "uri_refused", "the uri carries a password")
    try:
        raise ValueError("in a library")
    except ValueError:
        logging.getLogger("hqlabel.pipeline.stages.segment").exception("the GPU is lost: %s", "x")
    logging.getLogger("somebody.else").info("not ours")
"""


def test_every_line_is_json_with_its_ids_and_no_secret() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER)], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines()]

    assert [line["event"] for line in lines] == [
        "unit_committed",
        "image_failed",
        "image_failed",
        "the GPU is lost: x",
    ]
    assert (lines[0]["run_id"], lines[0]["unit_id"], lines[0]["failed_by_code"]) == ("r", 7, {"empty": 1})
    assert (lines[1]["image_id"], lines[1]["level"]) == ('a"\n\x1b[2J.jpg', "WARNING")
    assert "\x1b" not in done.stderr
    assert "secret" not in done.stderr
    assert "in a library" in lines[3]["exception"]
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "text",
    [
        "s3://user:pass@bucket/a.jpg",
        "https://token@host/a.jpg",
        "https://h/a.jpg?X-Amz-Signature=abc",
        "x://a:b@c",
    ],
)
def test_what_carries_a_credential_is_withheld(text: str) -> None:
    assert without_credentials(text) == "(withheld: it carries a credential)"


@pytest.mark.parametrize(
    "text", ["a@2x.jpg", "s3://bucket/me@home/a.jpg", "street/0001.jpg", "https://h/a?x=1"]
)
def test_other_ids_stand_as_they_are(text: str) -> None:
    assert without_credentials(text) == text
