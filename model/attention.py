"""Attention with decomposed relative position over squares of tokens: one definition, three roads.

The definition, from MViTv2 (arXiv 2112.01526) as SAM uses it: softmax(q k' / sqrt(d) + rel_h + rel_w) v,
where rel_h[q, k] = q . table_h[row(q) - row(k) + side - 1] with the *unscaled* q, and rel_w the same with
columns. The tables are (2 side - 1, d) and shared by the heads.

`plain_attention` is just that; it can be differentiated, and the other two are held to it.
`blocked_attention` is for CPUs: it works on a strip of logits that stays in the cache. `folded_attention` is
for GPUs: the terms become further columns of q and k, so that any fused kernel takes them, and no logits are
ever stored.

Letters: h heads, n squares (windows of all images, or whole grids), L = side * side tokens of a square,
d width of a head, D the width after folding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

STRIP_LOGITS = 1 << 21
"""Logits held at a time by `blocked_attention`: 4 MiB in bfloat16, so that a strip and its weights stay in
a core's share of the last cache. Smaller strips repeat the packing of the keys too often."""


def plain_attention(
    q_nhLd: torch.Tensor,
    k_nhLd: torch.Tensor,
    v_nhLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return the definition, (n, h, L, d).

    It holds the (L, L) logits of every head, 0.8 GiB in fp32 for one image in a global block of ViT-B.
    """
    n, h, length, d = q_nhLd.shape
    side = (table_h.shape[0] + 1) // 2
    offset = torch.arange(side, device=q_nhLd.device)
    offset = offset[:, None] - offset[None, :] + side - 1
    q_grid = q_nhLd.reshape(n, h, side, side, d)
    rel_h = torch.einsum("nhyxd,ykd->nhyxk", q_grid, table_h[offset])
    rel_w = torch.einsum("nhyxd,xkd->nhyxk", q_grid, table_w[offset])
    logits = ((q_nhLd * d**-0.5) @ k_nhLd.transpose(-2, -1)).view(n, h, side, side, side, side)
    # In place: each copy of the logits costs as much memory again. Nothing needs them without the terms.
    logits += rel_h[..., :, None]
    logits += rel_w[..., None, :]
    weights: torch.Tensor = logits.view(n, h, length, length).softmax(-1)
    return weights @ v_nhLd


def blocked_attention(
    q_hnLd: torch.Tensor,
    k_hnLd: torch.Tensor,
    v_hnLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return the same as (n, L, h * d), without gradients: head by head, a strip of rows at a time.

    q, k and v are contiguous. In bfloat16 the logits are rounded twice, the plain road's four times.
    """
    h, n, length, d = q_hnLd.shape
    side = (table_h.shape[0] + 1) // 2
    tables_dT = offset_tables(table_h, table_w)
    out_nLhd = q_hnLd.new_empty(n, length, h, d)
    attend = _attend_folded if 2 * side < d else _attend_in_strips
    squares = max(1, min(n, STRIP_LOGITS // length**2))
    for head in range(h):
        for start in range(0, n, squares):
            part = slice(start, start + squares)
            q_mLd, k_mLd, v_mLd = q_hnLd[head, part], k_hnLd[head, part], v_hnLd[head, part]
            attend(q_mLd, k_mLd, v_mLd, tables_dT, out_nLhd[part, :, head])
    return out_nLhd.flatten(2)


def _attend_folded(
    q_mLd: torch.Tensor,
    k_mLd: torch.Tensor,
    v_mLd: torch.Tensor,
    tables_dT: torch.Tensor,
    out_mLd: torch.Tensor,
) -> None:
    """Squares that are small beside a head: a few more columns cost less than a pass over the logits."""
    q_mLD, k_mLD = fold(q_mLd, k_mLd, tables_dT)
    weights_mLL = torch.bmm(q_mLD, k_mLD.transpose(1, 2)).softmax(-1)
    torch.bmm(weights_mLL, v_mLd, out=out_mLd)


def _attend_in_strips(
    q_mLd: torch.Tensor,
    k_mLd: torch.Tensor,
    v_mLd: torch.Tensor,
    tables_dT: torch.Tensor,
    out_mLd: torch.Tensor,
) -> None:
    """Large squares: the terms are written first, and the product of q and k is added onto them."""
    m, length, d = q_mLd.shape
    side = (tables_dT.shape[1] // 2 + 1) // 2
    rel_h, rel_w = offset_terms(q_mLd, tables_dT)
    step = max(1, min(side, STRIP_LOGITS // (m * side * length)))
    logits, weights = (q_mLd.new_empty(m * step * side * length) for _ in range(2))
    k_mdL = k_mLd.transpose(1, 2)
    for row in range(0, side, step):
        rows = slice(row, min(row + step, side))
        tokens = slice(rows.start * side, rows.stop * side)
        shape = (m, tokens.stop - tokens.start, length)
        size = m * shape[1] * length
        strip, strip_weights = logits[:size].view(shape), weights[:size].view(shape)
        grid = strip.view(m, -1, side, side, side)
        torch.add(rel_h[:, rows, :, :, None], rel_w[:, rows, :, None, :], out=grid)
        strip.baddbmm_(q_mLd[:, tokens], k_mdL, alpha=d**-0.5)
        torch.softmax(strip, -1, out=strip_weights)
        torch.bmm(strip_weights, v_mLd, out=out_mLd[:, tokens])


def folded_attention(
    q_nhLd: torch.Tensor,
    k_nhLd: torch.Tensor,
    v_nhLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return the same as (n, h, L, d), by PyTorch's fused attention.

    Its kernels want q, k and v of one width, so v is widened by zeros; that costs less than logits in memory.
    """
    n, h, length, d = q_nhLd.shape
    q_mLD, k_mLD = fold(
        q_nhLd.reshape(n * h, length, d), k_nhLd.reshape(n * h, length, d), offset_tables(table_h, table_w)
    )
    shape = (n, h, length, q_mLD.shape[-1])
    v_nhLD = F.pad(v_nhLd, (0, shape[-1] - d))
    out_nhLD = F.scaled_dot_product_attention(q_mLD.view(shape), k_mLD.view(shape), v_nhLD, scale=1.0)
    return out_nhLD[..., :d]


def fold(
    q_mLd: torch.Tensor, k_mLd: torch.Tensor, tables_dT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q' and k', (m, L, D) each, whose product is q k' / sqrt(d) + rel_h + rel_w.

    q' is [q / sqrt(d), rel_h, rel_w], and k' [k, row of the key, column of the key] with rows and columns as
    ones among zeros. D is d + 2 side, filled up with zeros to a multiple of 8, as fast kernels want it.
    """
    m, length, d = q_mLd.shape
    side = (tables_dT.shape[1] // 2 + 1) // 2
    rel_h, rel_w = offset_terms(q_mLd, tables_dT)
    q_mLD, k_mLD = (q_mLd.new_zeros(m, length, -(-(d + 2 * side) // 8) * 8) for _ in range(2))
    q_mLD[..., :d] = q_mLd * d**-0.5
    q_grid = q_mLD.view(m, side, side, -1)
    q_grid[..., d : d + side], q_grid[..., d + side : d + 2 * side] = rel_h, rel_w
    place = torch.eye(side, dtype=q_mLd.dtype, device=q_mLd.device)
    k_mLD[..., :d] = k_mLd
    k_mLD[..., d : d + side] = place.repeat_interleave(side, dim=0)
    k_mLD[..., d + side : d + 2 * side] = place.repeat(side, 1)
    return q_mLD, k_mLD


def offset_tables(table_h: torch.Tensor, table_w: torch.Tensor) -> torch.Tensor:
    """Return both tables side by side, (d, 2 (2 side - 1)), the largest offset of each first."""
    return torch.cat([table_h.flip(0), table_w.flip(0)]).T.contiguous()


def offset_terms(q_mLd: torch.Tensor, tables_dT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rel_h and rel_w, (m, side, side, side): query row, query column, key row (column).

    One product of all queries with all offsets. With the offsets in falling order, those of a query in row
    y to keys in rows 0, 1, ... begin at side - 1 - y and follow each other, so both results are views.
    """
    m, length, _ = q_mLd.shape
    width = tables_dT.shape[1]
    side = (width // 2 + 1) // 2
    products = (q_mLd.flatten(0, 1) @ tables_dT).contiguous()
    shape, square = (m, side, side, side), length * width
    rel_h = products.as_strided(shape, (square, side * width - 1, width, 1), side - 1)
    rel_w = products.as_strided(shape, (square, side * width, width - 1, 1), 3 * side - 2)
    return rel_h, rel_w
