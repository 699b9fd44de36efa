"""The tests that are marked `gpu`, with the result of each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.setting import Setting, Wrong

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "model"


def run(setting: Setting) -> list[dict[str, Any]]:
    """One row a test.

    Raises:
        Wrong: one failed, or none ran, although there is a GPU.
    """
    files = [str(path) for path in sorted(FOLDER.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.xml")
        # Not the tests' common fixtures, which need all that the product needs; no warning is an error, since
        # the versions here may be others than the pinned ones.
        command = [
            *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider"),
            *(
                "-W",
                "default",
                "-o",
                "addopts=--import-mode=importlib",
                f"--confcutdir={FOLDER}",
                f"--junitxml={found}",
                *files,
            ),
        ]
        status = subprocess.run(command, cwd=ROOT, check=False, timeout=220).returncode
        rows = [_row(case) for case in ET.parse(found).iter("testcase")]
    results = [row["result"] for row in rows]
    if not rows or status != 0:
        raise Wrong(
            f"pytest ended with status {status}, {results.count('failed')} of {len(rows)} failed", rows
        )
    if setting.on_gpu and "passed" not in results:
        raise Wrong("no test ran on the GPU", rows)
    return rows


def _row(case: ET.Element) -> dict[str, Any]:
    for name, result in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        told = case.find(name)
        if told is not None:
            return {"test": case.get("name"), "result": result, "message": told.get("message", "")[:200]}
    return {
        "test": case.get("name"),
        "result": "passed",
        "seconds": float(case.get("time", 0)),
        "message": "",
    }
