"""Nothing is let in: no pickle is run, no file or host beyond the rules is opened, no secret is written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hqlabel.jobs.job_setup.check_models import read_checkpoint
from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.errors import JobRefused, SystemicFault
from hqlabel.pipeline.job_context import Weights
from hqlabel.pipeline.stages.load_model import load_model
from tests.conftest import MotoS3
from tests.e2e import commands
from tests.e2e.scenes import small_checkpoint
from tests.faults import corpus

SWITCHES = (
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)


pytestmark = pytest.mark.timeout(600)  # whole jobs, on a machine that may be busy


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


class Canary:
    """Makes a folder when it is unpickled without restriction."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._place,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("weights") / "small")


def spoiled(checkpoint: Path, folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the checkpoint after `spoil` changed its tensors."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _first(tensors: dict[str, torch.Tensor], ending: str = "weight") -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending) and tensors[name].ndim > 1)


SPOILS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "one key missing": lambda tensors: tensors.pop(_first(tensors)),
    "one key more": lambda tensors: tensors.update(another=torch.zeros(3)),
    "one shape": lambda tensors: tensors.update({_first(tensors): torch.zeros(3, 5)}),
    "not finite": lambda tensors: tensors[_first(tensors)].view(-1)[7].fill_(float("nan")),
    "infinite": lambda tensors: tensors[_first(tensors)].view(-1)[7].fill_(float("inf")),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_a_spoiled_checkpoint_is_refused_by_name_before_any_image(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = spoiled(checkpoint, tmp_path / "spoiled", SPOILS[kind])

    with pytest.raises(JobRefused, match=re.escape(str(folder))):
        read_checkpoint(Config.model_validate({"model": {"checkpoint": str(folder)}}))


@pytest.mark.parametrize("body", [b"", b"<!DOCTYPE html><html>", b"cut"], ids=["empty", "page", "cut"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(
    body: bytes, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    whole = (checkpoint / "model.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if body == b"cut" else body)

    with pytest.raises(JobRefused, match=re.escape(str(path))):
        read_checkpoint(Config.model_validate({"model": {"checkpoint": str(path)}}))


def test_a_flipped_byte_is_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    before = read_checkpoint(Config.model_validate({"model": {"checkpoint": str(checkpoint)}}))
    folder = tmp_path / "flipped"
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    path.write_bytes(corpus.flipped(path.read_bytes(), path.stat().st_size - 2))

    with pytest.raises(SystemicFault, match=before.sha256):
        load_model(Weights(source=str(folder), sha256=before.sha256))


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_a_hostile_checkpoint_runs_nothing_and_the_command_ends_with_4(
    switch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"image_encoder.pos_embed": Canary(tmp_path / "canary")}, path)
    picture = tmp_path / "a.png"
    corpus.quadrants().save(picture)
    if switch is not None:
        monkeypatch.setenv(switch, "1")
    command = [
        "label",
        "--images",
        str(tmp_path),
        "--checkpoint",
        str(path),
        "--output",
        str(tmp_path / "out"),
    ]
    said = commands.run_here(*command, code=4).stderr

    assert str(path) in said if switch is None else f"Unset: {switch}" in said
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------

# Runs in a process of its own, in which Ray Data has been imported with every loosening switch set.
PARQUET_SCRIPT = """
    import base64, json, os, pickle, sys
    from pathlib import Path
    import pyarrow as pa, pyarrow.parquet as pq
    import ray.data, pandas
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
    from ray.data.extensions import ArrowTensorType
    import ray.cloudpickle as cloudpickle
    from hqlabel.pipeline import schema
    from hqlabel.pipeline.errors import HqlabelError
    from hqlabel.pipeline.settings import InputSettings
    from hqlabel.pipeline.planning.make_plan import make_plan
    from hqlabel.pipeline.job_context import AccessRules, Place
    from hqlabel.pipeline.storage import checksummed_parquet
    from hqlabel.pipeline.storage.output_store import Store
    from hqlabel.pipeline.tables.unit_files import CommittedUnit, read_committed

    folder = Path(sys.argv[1])

    class Canary:
        def __init__(self, name):
            self.name = name
        def __reduce__(self):
            return os.mkdir, (str(folder / ("canary-" + self.name)),)

    def extension(name, payload, kind):
        metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
        return pa.field("boxes", kind, metadata=metadata)

    LISTS = pa.list_(pa.list_(pa.float64()))
    def tensor(name, label):
        return extension(name, cloudpickle.dumps(Canary(label)), LISTS)

    def objects(label):
        boxes = ArrowPythonObjectArray.from_objects([Canary(label)])
        return pa.table({"image_uri": ["a.png"], "boxes": boxes})

    def with_field(field):
        boxes = pa.array([[[1.0, 2.0, 3.0, 4.0]]], field.type)
        fields = pa.schema([("image_uri", pa.string()), field])
        return pa.Table.from_arrays([pa.array(["a.png"]), boxes], schema=fields)

    def with_footer(label):
        table = pa.table({"image_uri": ["a.png"], "boxes": pa.array([[[1.0, 2.0, 3.0, 4.0]]], LISTS)})
        pickled = pickle.dumps(Canary(label))
        return table.replace_schema_metadata({"pandas": pickled, "hqlabel.run_id": pickled, "ray": pickled})

    HOSTILE = {
        "tensor v1": lambda label: with_field(tensor("ray.data.arrow_tensor", label)),
        "tensor v2": lambda label: with_field(tensor("ray.data.arrow_tensor_v2", label)),
        "variable tensor": lambda label: with_field(tensor("ray.data.arrow_variable_shaped_tensor", label)),
        "python type": lambda label: with_field(tensor("arrow.py_extension_type", label)),
        "unknown type": lambda label: with_field(tensor("somebody.else", label)),
        "object values": objects,
        "footer": with_footer,
    }

    def outcome(function):
        try:
            function()
        except HqlabelError as error:
            return type(error).__name__
        return "read"

    def sung(label):
        return (folder / ("canary-" + label)).is_dir()

    found = {"registered": sorted(
        kind.__name__ for kind in (ray.data.extensions.ArrowTensorType, ray.data.extensions.ArrowTensorTypeV2)
    )}
    # The traps are armed: plain pyarrow springs them.
    for name in ("tensor v1", "object values"):
        path = folder / f"armed {name}.parquet"
        pq.write_table(HOSTILE[name](f"armed {name}"), path)
        try:
            pq.read_table(path).to_pylist()
        except Exception as error:
            found[f"error {name}"] = repr(error)
        found[f"armed {name}"] = sung(f"armed {name}")

    for name, make in HOSTILE.items():
        body_path = folder / f"{name}.parquet"
        pq.write_table(make(name), body_path)
        body = body_path.read_bytes()
        store = Store(Place(uri=str(folder / f"store {name}")))
        store.put("units/00000000.g0.parquet", body)
        output = folder / f"out {name}"
        for part in ("images", "instances"):
            (output / part).mkdir(parents=True)
            (output / part / "part-00000.parquet").write_bytes(body)
        unit = CommittedUnit(unit_id=0, generation=0, key="units/00000000.g0.parquet", size=len(body))
        sealed = checksummed_parquet.seal(body + checksummed_parquet._BLANK)
        found[name] = {
            "boxes": outcome(lambda: make_plan(InputSettings(boxes=str(body_path)))),
            "images": outcome(lambda: make_plan(InputSettings(images=str(body_path)))),
            "earlier": outcome(lambda: make_plan(InputSettings(boxes=str(output)))),
            "unit": outcome(lambda: read_committed(store, unit)),
            "sealed": outcome(lambda: checksummed_parquet.read_body(sealed, schema.UNIT, "unit")),
            "sung": sung(name),
        }
    print(json.dumps(found))
"""


def test_no_parquet_file_runs_code_whatever_ray_and_its_switches_allow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PARQUET_SCRIPT), str(tmp_path)],
        cwd=commands.REPOSITORY,
        env={**os.environ, **dict.fromkeys(SWITCHES, "1")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)

    assert found["armed tensor v1"], found
    assert found["armed object values"], found
    hostile = {name: facts for name, facts in found.items() if isinstance(facts, dict)}
    assert len(hostile) == 7
    assert [name for name, facts in hostile.items() if facts["sung"]] == []
    plain = hostile.pop("footer")
    assert (plain["boxes"], plain["images"]) == (
        "read",
        "read",
    )  # its columns are plain, its footer is not looked at
    for name, facts in hostile.items():
        assert facts["boxes"] == "JobRefused", (name, facts)
        assert facts["earlier"] == "JobRefused", (name, facts)
        assert facts["unit"] == facts["sealed"] == "DamageFound", (name, facts)


def test_every_extension_type_that_python_registers_is_taken_off_before_a_file_is_opened() -> None:
    import pandas.core.arrays.arrow.extension_types  # noqa: F401
    import ray.data.extensions  # noqa: F401

    from hqlabel.pipeline.storage.checksummed_parquet import _TYPES_WITH_CODE

    def below(kind: type) -> Iterator[type]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    known = {"ArrowTensorType", "ArrowTensorTypeV2", "ArrowVariableShapedTensorType", "ArrowPythonObjectType"}
    known |= {
        "ArrowPeriodType",
        "ArrowIntervalType",
        "UnknownExtensionType",
        "_BaseFixedShapeArrowTensorType",
    }
    found = {kind.__name__ for kind in below(pa.ExtensionType) if not kind.__module__.startswith("tests")}
    assert found <= known, (
        "a new type: see whether it runs code, and add it to pipeline/storage/checksummed_parquet.py"
    )
    assert len(_TYPES_WITH_CODE) >= 6


# ---------------------------------------------------------------------------------------------
# Files and hosts, seen by the kernel
# ---------------------------------------------------------------------------------------------

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed, so nobody can see what is opened"
)

OPENING_SCRIPT = """
    import json, sys
    from pathlib import Path
    from hqlabel.pipeline.images.fetch import fetch_ahead
    from hqlabel.pipeline.planning.plan_table import refused_uris
    from hqlabel.pipeline.job_context import AccessRules
    from hqlabel.pipeline.settings import Limits
    import pyarrow as pa
    root, uris = sys.argv[1], json.loads(sys.argv[2])
    access, limits = AccessRules(roots=(root,)), Limits()  # pydantic looks for plugins at the first one
    open(root + "/BEGIN").close() if Path(root + "/BEGIN").exists() else None
    refused = refused_uris(pa.array(uris, pa.large_string()), access)
    outcomes = [one.error.code if one.error else "opened" for one in fetch_ahead(uris, access, limits)]
    print(json.dumps([len(refused), outcomes]))
"""


def traced(command: list[str], log: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The finished command; `log` holds the files it and its children opened and the hosts they called."""
    calls = "trace=open,openat,openat2,connect,bind,listen,execve"
    return subprocess.run(
        # --seccomp-bpf: the other calls run at full speed
        ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", calls, "-o", str(log), *command],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@needs_strace
def test_refused_uris_open_no_file_and_call_no_host(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    (root / "BEGIN").write_bytes(b"")
    (root / "link.png").symlink_to(outside / "secret.png")
    uris = [case.uri for case in corpus.uri_cases(outside) if case.uri]
    uris = [f"{root}/{uri}" if uri.startswith(("..", "n/")) else uri for uri in uris] + [
        str(root / "link.png")
    ]
    log = tmp_path / "log"
    script = textwrap.dedent(OPENING_SCRIPT)
    done = traced(
        [sys.executable, "-c", script, str(root), json.dumps(uris)], log, cwd=commands.REPOSITORY, timeout=200
    )
    assert done.returncode == 0, done.stderr
    count, outcomes = json.loads(done.stdout)

    assert set(outcomes) == {"uri_refused"}
    assert (
        count >= len(uris) - 1
    )  # a plain name stands for its folder's; the link itself is the worker's to judge
    text = log.read_text(errors="replace")
    assert f'"{root}/BEGIN"' in text, "the trace does not see what it should"
    after = text[text.index(f'"{root}/BEGIN"') :]
    opened = re.findall(r'open(?:at|at2)?\([^"]*"([^"]*)"', after)
    foreign = [path for path in opened if not _is_library(path) and not path.startswith(str(root / "BEGIN"))]
    assert foreign == []
    assert re.findall(r"connect\(.*AF_INET.*", after) == []


PLANNING_SCRIPT = """
    import json, sys
    from hqlabel.pipeline.errors import JobRefused
    from hqlabel.pipeline.settings import InputSettings
    from hqlabel.pipeline.planning.make_plan import make_plan
    found = []
    for inputs in json.loads(sys.argv[1]):
        open(inputs["images"] + "/BEGIN").close()
        try:
            plan = make_plan(InputSettings(**inputs))
            found.append(plan.table["error_code"].to_pylist())
        except JobRefused as error:
            found.append(str(error))
    print(json.dumps(found))
"""


@needs_strace
def test_planning_a_folder_of_links_opens_nothing_that_they_lead_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("deep/secret.png", "secret.txt", "secret.jsonl", "secret"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(b"\x89PNG secret")

    def folder(name: str, *links: tuple[str, Path]) -> str:
        made = tmp_path / name
        made.mkdir(parents=True)
        (made / "BEGIN").touch()
        (made / "own1.png").touch()
        (made / "own2.png").touch()
        for link, target in links:
            (made / link).symlink_to(target)
        return str(made)

    plain = folder("plain")
    few = folder("few", ("a.png", outside / "deep" / "secret.png"), ("no-ending", outside / "secret"))
    deep = folder("deep", ("sub", outside / "deep"))
    labels = folder("labels", ("own1.txt", outside / "secret.txt"))
    tables = folder("tables", ("t.jsonl", outside / "secret.jsonl"))
    hub = folder(
        "models--o--n/snapshots/0", ("a.png", tmp_path / "models--o--n" / "blobs" / "deep" / "secret.png")
    )
    (tmp_path / "models--o--n" / "blobs").symlink_to(outside)
    asked = [{"images": place} for place in (few, deep, hub)]
    asked += [{"images": plain, "boxes": place} for place in (labels, tables)]
    log = tmp_path / "log"
    script = textwrap.dedent(PLANNING_SCRIPT)

    done = traced(
        [sys.executable, "-c", script, json.dumps(asked)], log, cwd=commands.REPOSITORY, timeout=200
    )

    assert done.returncode == 0, done.stderr
    first, *refused = json.loads(done.stdout)
    assert first == ["uri_refused", None, None]
    assert refused[1] == ["uri_refused", None, None], "a `blobs` that is a link is not believed"
    assert all("--allow-root" in text for text in (refused[0], *refused[2:]))
    text = log.read_text(errors="replace")
    opened = re.findall(r'open(?:at|at2)?\([^"]*"([^"]*)"', text)
    assert f"{few}/BEGIN" in opened, "the trace does not see what it should"
    reached = [path for path in opened if os.path.realpath(path).startswith(str(outside.resolve()))]
    assert reached == []


def _is_library(path: str) -> bool:
    """Code, not data: a module that Python loads late, or what its libraries ask about the machine."""
    places = (
        sys.prefix,
        sys.base_prefix,
        str(commands.REPOSITORY),
        "/usr/",
        "/lib",
        "/sys/",
        "/proc/cpuinfo",
    )
    return path.startswith(places) or path.endswith((".so", ".py", ".pyc")) or path == "/etc/localtime"


# ---------------------------------------------------------------------------------------------
# A whole job, watched
# ---------------------------------------------------------------------------------------------

SECRETS = {
    "AWS_ACCESS_KEY_ID": "CANARYKEY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canarysecretkey0123456789",
    "AWS_SESSION_TOKEN": "canarysessiontoken0123456789",
    "HF_TOKEN": "canaryhubtoken0123456789",
}
IN_URIS = "canaryuripassword0123456789"
KNOWN_LISTENERS = re.compile(r"gcs_server|raylet|ray::|default_worker|ray_cluster\.shutil")

# The command, but the private Ray's files stay, so that they can be searched.
KEEPING = """
    import pathlib, sys, tempfile
    import hqlabel.jobs.cluster.ray_cluster as ray_cluster
    ray_cluster.shutil = type("keeping", (), {"rmtree": staticmethod(lambda *a, **k: None)})
    keeping = pathlib.Path(tempfile.mkdtemp()) / "end_session.py"
    keeping.write_text(
        "import runpy, shutil\\nshutil.rmtree = lambda *a, **k: None\\n"
        f"runpy.run_path({str(ray_cluster._END_SESSION)!r}, run_name='__main__')\\n"
    )
    ray_cluster._END_SESSION = keeping
    from hqlabel.jobs.cli.main import main
    sys.argv[0] = "keeping"
    main()
"""


@dataclass(kw_only=True)
class Watch:
    """What a process and its children did while they ran.

    A process that is about to end has no command line any more: it is known by the last one it had.
    """

    command_lines: set[str] = field(default_factory=set)
    lines: dict[psutil.Process, str] = field(default_factory=dict)
    ports: set[tuple[psutil.Process, int]] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)

    @property
    def listeners(self) -> set[tuple[str, int]]:
        return {(self.lines.get(process, ""), port) for process, port in self.ports}

    def look(self, process: psutil.Process) -> None:
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                line = " ".join(one.cmdline())
                if line:
                    self.lines[one] = line
                    self.command_lines.add(line)
                for connection in one.net_connections(kind="inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.ports.add((one, connection.laddr.port))
                    elif connection.raddr and not _is_here(connection.raddr.ip):
                        self.foreign.add(f"{connection.raddr.ip}:{connection.raddr.port} by {line}")


def _is_here(address: str) -> bool:
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return address.startswith("127.") or address.removeprefix("::ffff:") in own | {"::1"}


@dataclass(frozen=True, kw_only=True)
class Watched:
    said: str
    watch: Watch
    session: Path
    output: Path


@pytest.fixture(scope="module")
def watched(moto_s3: MotoS3, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A finished job on S3 with canaries for credentials, over good, bad and hostile rows."""
    base = tmp_path_factory.mktemp("watched")
    source, target = moto_s3.place(), moto_s3.place()
    s3 = fsspec.filesystem("s3", **moto_s3.options, skip_instance_cache=True)
    good = corpus.encode(corpus.quadrants(), "PNG")
    for name, body in {"a.png": good, "b.png": b"<html>", "c.png": good[:200]}.items():
        s3.pipe(f"{source.uri}/{name}", body)
    uris = [
        *(f"{source.uri}/{name}" for name in ("a.png", "b.png", "c.png", "missing.png")),
        f"s3://key:{IN_URIS}@bucket/a.png", f"https://user:{IN_URIS}@127.0.0.1:9/a.png",
        f"https://127.0.0.1:9/a.png?X-Amz-Signature={IN_URIS}", "http://169.254.169.254/latest/",
        "/etc/passwd",
    ]  # fmt: skip
    table = pa.table({"image_uri": uris, "boxes": [[corpus.BOXES["ul"]]] * len(uris)})
    pq.write_table(table, base / "boxes.parquet")
    temporary = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    command = [
        sys.executable, "-c", textwrap.dedent(KEEPING), "label", "--boxes", str(base / "boxes.parquet"),
        "--checkpoint", str(checkpoint), "--output", target.uri, "--set", "model.dtype=float32", "--set",
        f"storage.s3.endpoint_url={moto_s3.endpoint}", "--set", "output.images_per_unit=4",
    ]  # fmt: skip
    environment = {**os.environ, **SECRETS, "RAY_worker_niceness": "0", "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        command,
        cwd=commands.REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = Watch()
    thread = threading.Thread(target=_watch, args=(process, watch))
    thread.start()
    said, _ = process.communicate(timeout=540)
    thread.join()
    assert process.returncode == 3, said  # more failed than the budget
    s3.get(target.uri, str(base / "out"), recursive=True)
    yield Watched(said=said, watch=watch, session=temporary, output=base / "out")
    shutil.rmtree(temporary)


def _watch(process: subprocess.Popen[str], watch: Watch) -> None:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process.pid)
        while process.poll() is None:
            watch.look(root)
            time.sleep(0.1)


@pytest.mark.slow
def test_no_secret_stands_in_any_log_file_row_or_command_line(watched: Watched) -> None:
    places = [watched.session, watched.output]
    files = [
        path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    logs = [path for path in files if path.suffix in (".log", ".out", ".err")]
    assert len(logs) > 5, "Ray's logs are not where they are looked for"
    hits = [
        f"{path}: {name}"
        for path in files
        for name, secret in {**SECRETS, "in a uri": IN_URIS}.items()
        if secret.encode() in path.read_bytes() and not (name == "in a uri" and _holds_uris(path, watched))
    ]
    assert hits == []
    for name, secret in SECRETS.items():
        assert secret not in watched.said, name
        assert not any(secret in line for line in watched.watch.command_lines), name
    assert len(watched.watch.command_lines) > 3


def _holds_uris(path: Path, watched: Watched) -> bool:
    """The tables repeat each uri as it was given; a password in it was never ours to keep."""
    return path.is_relative_to(watched.output) and path.suffix == ".parquet"


@pytest.mark.slow
def test_what_a_uri_carries_is_not_said(watched: Watched) -> None:
    assert IN_URIS not in watched.said
    images = pa.concat_tables(pq.read_table(part) for part in (watched.output / "images").glob("*.parquet"))
    assert not any(IN_URIS in (text or "") for text in images["error_message"].to_pylist())
    assert images["error_code"].to_pylist().count("uri_refused") == 5


@pytest.mark.slow
def test_only_rays_own_processes_listen_and_no_dashboard(watched: Watched) -> None:
    lines = {line for line, _ in watched.watch.listeners}
    assert any("gcs_server" in line for line in lines), "the watch saw nothing"
    assert [line for line in lines if not KNOWN_LISTENERS.search(line)] == []
    assert 8265 not in {port for _, port in watched.watch.listeners}
    # Neither may run at all: one asks the cloud's metadata service, the other listens to every network.
    side = ("dashboard/dashboard.py", "/monitor.py")
    assert [line for line in watched.watch.command_lines if any(name in line for name in side)] == []


@pytest.mark.slow
def test_no_host_but_this_machine_was_called(watched: Watched) -> None:
    assert watched.watch.foreign == set()


@pytest.mark.slow
def test_rays_files_are_the_owners_alone(watched: Watched) -> None:
    [root] = watched.session.glob("hqlabel-*")
    assert root.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in root.iterdir())


ALLOWED_PLACES = (
    "/usr/",
    "/lib",
    "/sys/",
    "/proc/",
    "/dev/",
    "/etc/",
    "/run/",
    "/var/",
    "/opt/",
    f"{Path.home()}/.",
)


@needs_strace
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_whole_job_opens_nothing_beyond_its_inputs_and_calls_nobody(
    checkpoint: Path, tmp_path: Path
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(corpus.encode(corpus.quadrants(), "PNG"))
    cases = [*corpus.file_cases(outside), *corpus.uri_cases(outside), *list(corpus.refused_cases())[:12]]
    for case in cases:
        if case.place is not None:
            case.place(root)
    uris = [case.uri if case.uri is not None else f"{root}/{case.name}" for case in cases]
    ids = [case.name for case in cases]
    table = pa.table({"image_id": ids, "image_uri": uris, "boxes": [[corpus.BOXES["ul"]]] * len(ids)})
    pq.write_table(table, root / "boxes.parquet")
    temporary = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    command = [
        sys.executable, "-m", "hqlabel", "label", "--boxes", str(root / "boxes.parquet"), "--checkpoint",
        str(checkpoint), "--output", str(tmp_path / "out"), "--set", "model.dtype=float32",
        "--set", "cluster.actors=1",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_worker_niceness": "0", "TMPDIR": str(temporary)}
    log = tmp_path / "log"
    done = traced(command, log, cwd=commands.REPOSITORY, env=environment, timeout=800)
    shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 3, done.stdout + done.stderr  # more failed than the budget
    text = log.read_text(errors="replace")
    images = pa.concat_tables(pq.read_table(part) for part in (tmp_path / "out" / "images").glob("*.parquet"))

    assert images["status"].to_pylist().count("labelled") == 2
    opened = set(re.findall(r'open(?:at|at2)?\([^"]*"(/[^"]*)".* = \d+', text))
    assert any(path.startswith(f"{root}/s/target.png") for path in opened), "the trace does not see the job"
    mine = (str(root), str(tmp_path / "out"), str(checkpoint), str(temporary), str(commands.REPOSITORY))
    python = (sys.prefix, sys.base_prefix)
    beyond = {path for path in opened if not path.startswith((*mine, *python, *ALLOWED_PLACES))}
    listed = {"/", "/tmp", "/dev", "/proc", str(Path.home()), str(tmp_path)}  # folders, not what they hold
    assert beyond <= listed
    assert not any("secret.png" in path or "outside" in path for path in opened)
    assert "/dev/zero" not in opened
    # torch's own library looks at its environment so, by open(), while it is loaded; all of Python and Arrow
    # opens by openat().
    assert not re.search(r'openat2?\([^"]*"/proc/(self|\d+)/environ"', text)
    # Ray learns its own address so: a datagram socket that is connected and never written to sends nothing.
    without_own_address = text.replace('sin_port=htons(53), sin_addr=inet_addr("8.8.8.8")', "")
    called = set(re.findall(r'connect\(.*sin6?_addr.*?"([^"]+)"', without_own_address))
    assert {address for address in called if not _is_here(address)} == set()
    started = set(re.findall(r'execve\("([^"]+)"', text))
    assert {Path(path).name for path in started} & {
        "gs",
        "ghostscript",
        "convert",
        "dcraw",
        "xdg-open",
    } == set()
