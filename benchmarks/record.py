"""Runs a command, shows what it prints, and writes it to docs/dev/measurements.md with its circumstances.

    python -m benchmarks.record python -m benchmarks.masks_rle --rounds 3
    python -m benchmarks.record python -m benchmarks.resume --rows 20000

Added are the date, the commit (with a word when files differ from it), the machine, the versions and the
command. Programs are those of this Python's environment. A command that fails leaves nothing.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dev" / "measurements.md"
HEADING = "\n# As printed\n\nWhat `python -m benchmarks.record COMMAND` wrote down, oldest first.\n"
PACKAGES = ("torch", "ray", "pyarrow", "pillow", "pycocotools", "transformers", "segment-anything-hq")


def main(command: Sequence[str]) -> int:
    """The command's exit status."""
    if not command:
        print(__doc__)
        return 2
    before = os.getloadavg()[0]
    tools = Path(sys.executable).parent  # not resolved: an environment's python is a link
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    if process.returncode == 0:
        write_down(PAGE, section(command, "".join(lines), load=before))
    return process.returncode


def section(command: Sequence[str], printed: str, *, load: float) -> str:
    """The Markdown of one run. `load`: of the machine, when it began."""
    from hqlabel.jobs.cluster.ray_cluster import usable_cpus  # here: `commit` works without Ray
    from hqlabel.jobs.cluster.ray_session import memory_bytes

    facts = [
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit()}",
        f"{cpu_name()}, {usable_cpus()} CPU cores, {memory_bytes() / 2**30:.0f} GiB, load {load:.1f} before",
        f"Python {platform.python_version()}, {', '.join(versions())}",
    ]
    return f"\n## `{shlex.join(command)}`\n\n{'; '.join(facts)}.\n\n```text\n{printed.strip()}\n```\n"


def write_down(page: Path, text: str) -> None:
    """None; `text` stands at the end of the page."""
    whole = page.read_text(encoding="utf-8")
    if HEADING not in whole:
        whole = whole.rstrip("\n") + "\n" + HEADING
    page.write_text(whole + text, encoding="utf-8")


def commit() -> str:
    """The commit of the working tree, in seven digits, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return git("rev-parse", "--short=7", "HEAD") + (" with changes" if changed else "")


def cpu_name() -> str:
    """The processor's name as Linux has it, or the machine's kind."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def versions() -> list[str]:
    """The installed ones of `PACKAGES`, with their versions."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
