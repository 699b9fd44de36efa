"""The parts of a GPU day, most valuable first. No torch here: the supervising process imports this.

The seconds are what a part is expected to take on a large GPU; nothing is begun that the time left would not
hold. They are estimates until a day has been run: `report.md` has the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

LARGE = ("vit_b", "vit_h", "vit_l", "hiera_l")
SHIPPED = {"images_per_call": 1, "boxes_per_call": 16}
"""The call shape of a job that sets none, on a GPU."""
WIDER = {"images_per_call": 4, "boxes_per_call": 40}
"""Four images with ten boxes each, and no box of padding."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something to measure: a function `module:name`, and what it is called with.

    `needs`: modules that it cannot do without. `limit_s`: when it is killed.
    """

    step: str
    key: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    expected_s: float = 10.0
    limit_s: float = 240.0

    @property
    def name(self) -> str:
        """Its step and its key."""
        return f"{self.step}/{self.key}"


def plan(*, rehearse: bool) -> list[Part]:
    """Every part, in the order of doing. A rehearsal's are as many, and smaller."""
    ten = {"boxes": 10}
    parts = [
        _part("machine/facts", "machine_facts:facts", 5),
        _part("machine/ceilings", "machine_facts:ceilings", 10),
        _part("tests/marked-gpu", "gpu_tests:run", 60, needs=("pytest", "pycocotools")),
        *_parity(),
        *_rates("rate", (*LARGE, "vit_tiny"), SHIPPED | ten),
        *_rates("rate", (*LARGE, "vit_tiny"), WIDER | ten),
        *_profiles(),
        *_attention(),
        *_chain(),
        *_compiled(),
        *_sweep(),
        *_memory(),
        *_peers(),
        *_rates("rate-float32", LARGE, SHIPPED | ten | {"dtype": "float32"}),
        *_rates("rate-noise", ("vit_b",), WIDER | ten | {"objects": False}),
    ]
    if rehearse:  # begun however little time is left
        return [replace(part, expected_s=1.0, limit_s=600.0) for part in parts]
    return parts


def _part(name: str, function: str, expected_s: float, *, limit_s: float = 240.0,
          needs: tuple[str, ...] = (), **arguments: Any) -> Part:  # fmt: skip
    step, _, key = name.partition("/")
    return Part(
        step=step, key=key, function=f"benchmarks.gpu_day.{function}", arguments=arguments, needs=needs,
        expected_s=expected_s, limit_s=limit_s,
    )  # fmt: skip


def _parity() -> Iterator[Part]:
    seconds = {"vit_b": 15, "vit_tiny": 10, "vit_h": 50, "vit_l": 30, "hiera_l": 25}
    for variant, expected_s in seconds.items():
        for dtype in ("float32", "bfloat16"):
            name = f"parity/{variant}-{dtype}"
            yield _part(name, "parity:parity", expected_s, variant=variant, dtype=dtype)
    for variant, dtype in (("vit_b", "bfloat16"), ("vit_b", "float32"), ("vit_h", "bfloat16")):
        yield _part(f"company/{variant}-{dtype}", "parity:company", 15, variant=variant, dtype=dtype)


def _shape(how: dict[str, Any]) -> str:
    return f"{how['images_per_call']}x{how['boxes_per_call']}"


def _rates(step: str, variants: tuple[str, ...], how: dict[str, Any]) -> Iterator[Part]:
    for variant in variants:
        yield _part(f"{step}/{variant}-{_shape(how)}", "rates:rate", 10, variant=variant, **how)


def _profiles() -> Iterator[Part]:
    for variant in LARGE:
        for how in (SHIPPED, WIDER):
            name = f"profile/{variant}-{_shape(how)}"
            yield _part(name, "kernel_times:kernel_times", 15, variant=variant, **how)


def _attention() -> Iterator[Part]:
    for variant, block in (("vit_b", "grid"), ("vit_h", "grid"), ("vit_b", "windows"), ("vit_h", "windows")):
        name = f"attention/{variant}-{block}"
        yield _part(name, "attention_backends:compare", 40, variant=variant, block=block, images=4)


def _compiled() -> Iterator[Part]:
    for variant in LARGE:
        how = {**WIDER, "boxes": 10}
        yield _part(f"compiled/{variant}", "rates:compiled", 120, limit_s=400, variant=variant, **how)


def _chain() -> Iterator[Part]:
    for variant, megapixels, draft in (
        ("vit_b", 1, False),
        ("vit_b", 12, False),
        ("vit_b", 12, True),
        ("vit_h", 12, False),
    ):
        how = {"variant": variant, "megapixels": megapixels, "draft_jpeg": draft}
        yield _part(f"chain/{variant}-{megapixels}mp{'-draft' * draft}", "jpeg_chain:chain", 45, **how)
    needs = ("ray", "pydantic", "duckdb")
    for megapixels in (1, 12):
        how = {"variant": "vit_b", "megapixels": megapixels}
        name = f"chain-ray/vit_b-{megapixels}mp"
        yield _part(name, "jpeg_chain:ray_chain", 90, limit_s=400, needs=needs, **how)


def _sweep() -> Iterator[Part]:
    shapes = ((1, 10), (2, 20), (4, 16), (8, 16), (8, 80), (16, 16), (16, 160))
    for variant in LARGE:
        for images, boxes_per_call in shapes:
            how = {"images_per_call": images, "boxes_per_call": boxes_per_call, "boxes": 10}
            yield _part(f"sweep/{variant}-{_shape(how)}", "rates:rate", 8, variant=variant, **how)


def _memory() -> Iterator[Part]:
    for variant in ("vit_b", "vit_h"):
        for megapixels, boxes in ((1, 10), (12, 10), (48, 10), (12, 200)):
            how = {"variant": variant, "megapixels": megapixels, "boxes": boxes, "rounds": 1, **SHIPPED}
            yield _part(f"memory/{variant}-{megapixels}mp-{boxes}", "rates:rate", 10, **how)


def _peers() -> Iterator[Part]:
    needs = ("transformers", "pycocotools")
    for variant in ("vit_b", "vit_l", "vit_h"):
        yield _part(f"peers/{variant}", "peers:beside_transformers", 45, needs=needs, variant=variant)
