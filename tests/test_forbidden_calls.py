"""No call that runs foreign code, skips a check or drops rows in silence stands in the product.

Each rule has a line of bad code beside it that it must catch; then the whole tree must be clean.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("hqlabel", "model", "pipeline", "jobs", "examples", "tools")

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "tempfile.mktemp": "races; use NamedTemporaryFile",
    "torch.hub.load": "runs foreign code",
}
# keyword -> the one value that may be written
FIXED_KEYWORDS = {
    "shell": False,
    "weights_only": True,
    "allow_pickle": False,
    "trust_remote_code": False,
    "max_errored_blocks": 0,
    "actor_task_retry_on_errors": False,
}
# assigned attribute -> the values that may be written; None: any number
FIXED_ATTRIBUTES: dict[str, tuple[object, ...] | None] = {
    "LOAD_TRUNCATED_IMAGES": (False,),
    "MAX_IMAGE_PIXELS": None,
    "max_errored_blocks": (0,),
    "actor_task_retry_on_errors": (False,),
}


def dotted(node: ast.expr) -> str:
    """The dotted name of an expression such as `os.path.join`, or what of it is a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def bad_imports(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    for name in names:
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield f"import of {name}"


def bad_calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name = dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in FORBIDDEN_NAMES:
        yield f"{name}()"
    for attribute, reason in FORBIDDEN_ATTRIBUTES.items():
        if name == attribute:
            yield f"{name}: {reason}"
    if name == "torch.load" and "weights_only" not in keywords:
        yield "torch.load without weights_only=True written out"
    if name == "ray.init" and "address" not in keywords:
        yield "ray.init without an address joins whatever cluster it finds"
    if name.endswith(".write_parquet"):
        yield "Ray's Parquet writer publishes half a job; units.commit is the way"
    for keyword, allowed in FIXED_KEYWORDS.items():
        value = keywords.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is allowed):
            yield f"{keyword} must be {allowed}"


def bad_assignments(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        attribute = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if attribute not in FIXED_ATTRIBUTES:
            continue
        allowed = FIXED_ATTRIBUTES[attribute]
        constant = isinstance(node.value, ast.Constant)
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        numeric = not constant or isinstance(value, int)
        if (allowed is None and not numeric) or (allowed is not None and value not in allowed):
            yield f"{attribute} = {ast.unparse(node.value)}"


def bad_yaml(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """yaml.load with anything but a loader which this very file derives from SafeLoader."""
    safe = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [dotted(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "yaml.load":
            loader = {k.arg: dotted(k.value) for k in node.keywords}.get("Loader")
            if loader not in safe:
                yield node.lineno, "yaml.load: use yaml.safe_load"


OPENS_PARQUET = re.compile(
    r"(pq\.(ParquetFile|ParquetDataset|read_\w+)|parquet\.read_\w+|pa\.ipc\.(open_|read_|RecordBatch|Message)\w*"
    r"|ipc\.open_\w+|.*\.read_parquet)\Z"
)


def opened_elsewhere(source: str) -> list[str]:
    """Calls that open a Parquet or Arrow file without taking registered extension types off first."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{c.lineno}: {dotted(c.func)}" for c in calls if OPENS_PARQUET.match(dotted(c.func))]


def forbidden(source: str) -> list[str]:
    """Every forbidden thing in `source`, as `line: what`."""
    tree = ast.parse(source)
    found = [
        (getattr(node, "lineno", 0), what)
        for node in ast.walk(tree)
        for rule in (bad_imports, bad_calls, bad_assignments)
        for what in rule(node)
    ]
    return [f"{line}: {what}" for line, what in [*found, *bad_yaml(tree)]]


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import ray.cloudpickle\nimport cloudpickle",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=maybe)",
        "os.system(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class Odd(yaml.Loader): ...\nyaml.load(text, Loader=Odd)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "ImageFile.LOAD_TRUNCATED_IMAGES = True",
        "Image.MAX_IMAGE_PIXELS = None",
        "MAX_IMAGE_PIXELS = None",
        "context.max_errored_blocks = -1",
        "DataContext(max_errored_blocks=5)",
        "context.actor_task_retry_on_errors = True",
        "dataset.write_parquet(path)",
        "ray.init()",
    ],
)
def test_the_lint_catches(source: str) -> None:
    assert forbidden(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(text)",
        "subprocess.run([text], check=True)",
        "yaml.safe_load(text)",
        "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
        "torch.load(path, weights_only=True)",
        "Image.MAX_IMAGE_PIXELS = limits.max_image_pixels",
        "context.max_errored_blocks = 0",
        "ray.init(address='local')",
    ],
)
def test_the_lint_leaves_alone(source: str) -> None:
    assert forbidden(source) == []


def test_the_product_makes_no_forbidden_call() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{what}"
        for tree in TREES
        for path in sorted((ROOT / tree).rglob("*.py"))
        for what in forbidden(path.read_text())
    ]

    assert found == []


@pytest.mark.parametrize(
    "source", ["pq.read_table(p)", "pq.ParquetFile(p)", "ray.data.read_parquet(p)", "pa.ipc.open_stream(b)"]
)
def test_the_lint_sees_a_parquet_file_being_opened(source: str) -> None:
    assert opened_elsewhere(source) != []
    assert opened_elsewhere("open_closed(stream)\npq.ParquetWriter(sink)") == []


def test_parquet_files_and_arrow_streams_are_opened_by_one_function_each_alone() -> None:
    """Opening one makes registered extension types; `open_closed` and `read_closed_stream` prevent it."""
    found = {
        str(path.relative_to(ROOT)): calls
        for tree in ("hqlabel", "model", "pipeline", "jobs")
        for path in sorted((ROOT / tree).rglob("*.py"))
        if (calls := opened_elsewhere(path.read_text()))
    }

    assert list(found) == ["pipeline/storage/checksummed_parquet.py"]
    calls = [call.partition(": ")[2] for call in found["pipeline/storage/checksummed_parquet.py"]]
    assert calls == ["pq.ParquetFile", "pa.ipc.open_stream"]
