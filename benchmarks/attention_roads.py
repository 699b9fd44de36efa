"""Attention with decomposed relative position by every road there is, on this device: which one is fastest?

    python -m benchmarks.attention_roads --threads 1
    python -m benchmarks.attention_roads --device cuda --variants vit_b vit_h --images 8

For each variant one block of each kind, over the whole grid and over windows, in bfloat16. `blocked` is what
a CPU takes and `folded` what a GPU takes; `plain` is the definition. `folded, v narrow` leaves v its width;
`biased` gives the fused kernel its terms as a mask of all logits; `flex` is FlexAttention, compiled, with the
terms looked up in the kernel; and `no terms` the fused kernel alone, which is another function: what the
terms cost at least.

Milliseconds are medians; the rate counts the two products of the definition and nothing that a road does
beside them. The error is the largest against the definition in float32, over its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import benchmark

from hqlabel.model.kernels import (
    blocked_attention,
    fold_offsets,
    folded_attention,
    offset_tables,
    offset_terms,
    plain_attention,
)
from hqlabel.model.sam_config import PUBLISHED, VisionConfig

Road = Callable[..., torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", choices=sorted(PUBLISHED), default=["vit_b"])
    parser.add_argument("--images", type=int, default=1, help="of a call")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(ROADS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each for")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| block | road | ms | TFLOP/s | error |\n|---|---|--:|--:|--:|")
    for name in options.variants:
        vision = PUBLISHED[name].vision
        if not isinstance(vision, VisionConfig):
            raise SystemExit(f"{name} has no attention of this kind")
        for title, side, squares in (
            ("grid", vision.grid, 1),
            ("windows", vision.window_size, (-(-vision.grid // vision.window_size)) ** 2),
        ):
            tensors = made(vision, side, squares * options.images, options.device)
            for road in options.roads:
                print(f"| {name}, {title} | {road} | {line(ROADS[road], tensors, options)} |", flush=True)


def made(vision: VisionConfig, side: int, squares: int, device: str) -> list[torch.Tensor]:
    """q, k, v (squares, h, L, d) and both tables, such as a trained block has: logits of a few units."""
    generator = torch.Generator().manual_seed(0)
    heads = vision.num_attention_heads
    width = vision.hidden_size // heads
    shapes = [(squares, heads, side * side, width)] * 3 + [(2 * side - 1, width)] * 2
    scales = (1.0, 1.0, 1.0, 0.1, 0.1)
    return [
        (scale * torch.randn(shape, generator=generator)).to(device, torch.bfloat16)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


@torch.no_grad()
def line(road: Road, tensors: list[torch.Tensor], options: argparse.Namespace) -> str:
    """The figures of one road."""
    squares, heads, length, width = tensors[0].shape
    try:
        out = road(*tensors)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]} | |"
    # Of one square and head: the definition in float32 holds all logits.
    one = [x[:1, :1].float() for x in tensors[:3]] + [x.float() for x in tensors[3:]]
    wanted = plain_attention(*one)
    error = float((out[:1, :1].float() - wanted).abs().max() / wanted.abs().max())
    timer = benchmark.Timer("road(*tensors)", globals={"road": road, "tensors": tensors},
                            num_threads=options.threads)  # fmt: skip
    seconds = timer.blocked_autorange(min_run_time=options.seconds).median
    rate = 4e-12 * squares * heads * length**2 * width / seconds
    return f"{1e3 * seconds:.2f} | {rate:.3f} | {error:.4f}"


def blocked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """`blocked_attention`, from and to the others' order of axes."""
    squares, heads, length, width = q.shape
    by_head = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    out: torch.Tensor = blocked_attention(*by_head, *tables)
    return out.view(squares, length, heads, width).transpose(1, 2)


def terms(q: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rel_h and rel_w, (squares, h, L, side) each, contiguous."""
    both = offset_terms(q.flatten(0, 1), offset_tables(table_h, table_w))
    rel_h, rel_w = (x.reshape(*q.shape[:3], -1).contiguous() for x in both)
    return rel_h, rel_w


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """The fused kernel with a mask of all logits."""
    rel_h, rel_w = terms(q, *tables)
    mask = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def folded_narrow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """`folded_attention` without widening v, by whichever kernel takes values of another width than keys."""
    squares, heads, length, _ = q.shape
    wide = fold_offsets(q.flatten(0, 1), k.flatten(0, 1), offset_tables(*tables))
    q_nhLD, k_nhLD = (x.view(squares, heads, length, -1) for x in wide)
    return F.scaled_dot_product_attention(q_nhLD, k_nhLD, v, scale=1.0)


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """FlexAttention; the terms are looked up for each logit inside the kernel."""
    rel_h, rel_w = terms(q, *tables)
    side = rel_h.shape[-1]

    def add_terms(score: Any, n: Any, head: Any, query: Any, key: Any) -> Any:
        return score + rel_h[n, head, query, key // side] + rel_w[n, head, query, key % side]

    out: torch.Tensor = compiled_flex()(q, k, v, score_mod=add_terms)
    return out


def no_terms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_tables: torch.Tensor) -> torch.Tensor:
    """The fused kernel without any."""
    return F.scaled_dot_product_attention(q, k, v)


ROADS: dict[str, Road] = {
    "blocked": blocked,
    "folded": folded_attention,
    "folded, v narrow": folded_narrow,
    "biased": biased,
    "flex": flex,
    "no terms": no_terms,
    "plain": plain_attention,
}

if __name__ == "__main__":
    main()
