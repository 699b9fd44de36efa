"""What the network computes with: each fast path next to its plain definition.

Which path a device takes is decided here alone. Every fast path equals its definition up to rounding, as
tests check; where gradients are wanted, or autocast is on, the definition is taken.

- The MLP of a transformer block.
- Attention with decomposed relative position over squares of tokens, from MViTv2 (arXiv 2112.01526) as SAM
  uses it: softmax(q k' / sqrt(d) + rel_h + rel_w) v, where
  rel_h[q, k] = q . table_h[row(q) - row(k) + side - 1] with the *unscaled* q, and rel_w the same with
  columns. The tables are (2 side - 1, d) and shared by the heads.
- SAM's 2x2 transposed convolutions of stride 2, as matrix products.
- The HQ branch's 3x3 convolutions, contracted with the HQ token's vector.

Letters: as in `records.py` and `mask_decoder.py`; h heads, n squares (windows of all images, or whole grids),
m squares computed together, of one head or of all, L = side * side tokens of a square, d width of a head, D
the width after `fold_offsets`, T = 2 (2 side - 1) entries of both tables, R rows of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

VIT_NORM_EPS = 1e-6
"""Epsilon of the ViT blocks' LayerNorms and of every channel norm (neck, upscaling, HQ branches)."""

TORCH_NORM_EPS = 1e-5
"""Epsilon of the two-way transformer's and TinyViT's LayerNorms, and of BatchNorm."""


def is_inference(device: torch.device) -> bool:
    """Return whether there are no gradients, and no autocast, which casts some products and not others."""
    kind = device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not torch.is_grad_enabled() and not autocast


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW tensor, biased variance, eps 1e-6.

    The result lies in memory channels last, which the convolution that follows takes as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=VIT_NORM_EPS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the normalised tensor, same shape and dtype."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def over_last_axis(self, x_C: torch.Tensor) -> torch.Tensor:
        """Return the same norm of a tensor (..., C) whose channels are its last axis."""
        return F.layer_norm(x_C, self.normalized_shape, self.weight, self.bias, self.eps)


# The MLP of a block

SHORT_STRIP, LONG_STRIP = 512, 2048
"""Tokens that go through an MLP together on a CPU, in bfloat16 and in float32. In bfloat16 the hidden values
of 512, 3 MiB for ViT-B, stay in a core's share of the caches; those of a whole image go out to memory and
back twice. A float32 product packs its weights anew in each call, which costs more than the caches give."""


def mlp(x: torch.Tensor, lin1: nn.Linear, lin2: nn.Linear) -> torch.Tensor:
    """Return linear, exact (erf) GELU, linear; a tensor of the input's shape."""
    if x.device.type != "cpu" or not is_inference(x.device):
        whole: torch.Tensor = lin2(F.gelu(lin1(x)))
        return whole
    rows_RC = x.flatten(0, -2)
    out_RC = torch.empty_like(rows_RC)
    tokens = SHORT_STRIP if x.dtype == torch.bfloat16 else LONG_STRIP
    parts = zip(*(torch.split(rows, tokens) for rows in (rows_RC, out_RC)), strict=True)
    for part_RC, out in parts:
        torch.addmm(lin2.bias, F.gelu(lin1(part_RC)), lin2.weight.t(), out=out)
    return out_RC.view(x.shape)


# Attention with relative position

STRIP_BYTES = 1 << 22
"""Bytes of logits, or of their terms, held at a time by `blocked_attention`: 4 MiB stay in a core's share of
the last cache. Smaller strips repeat the packing of the keys too often."""


def plain_attention(
    q_nhLd: torch.Tensor,
    k_nhLd: torch.Tensor,
    v_nhLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return softmax(q k' / sqrt(d) + rel_h + rel_w) v, (n, h, L, d): the definition, differentiable.

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
    """Return `plain_attention` as (n, L, h * d), without gradients: head by head, a strip of rows at a time.

    It is for CPUs: a strip of logits stays in the cache. q, k and v are contiguous. In
    bfloat16 the logits are rounded twice, in `plain_attention` four times.
    """
    h, n, length, d = q_hnLd.shape
    side = (table_h.shape[0] + 1) // 2
    tables_dT = offset_tables(table_h, table_w)
    out_nLhd = q_hnLd.new_empty(n, length, h, d)
    attend = _attend_masked
    if q_hnLd.dtype == torch.bfloat16:
        attend = _attend_folded if 2 * side < d else _attend_in_strips
    squares = max(1, min(n, STRIP_BYTES // (length**2 * q_hnLd.element_size())))
    for head in range(h):
        for start in range(0, n, squares):
            part = slice(start, start + squares)
            q_mLd, k_mLd, v_mLd = q_hnLd[head, part], k_hnLd[head, part], v_hnLd[head, part]
            attend(q_mLd, k_mLd, v_mLd, tables_dT, out_nLhd[part, :, head])
    return out_nLhd.flatten(2)


def attend_squares(
    q_hnLd: torch.Tensor,
    k_hnLd: torch.Tensor,
    v_hnLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return `plain_attention` as (n, L, h * d), without gradients, by the fast path of the device."""
    if q_hnLd.device.type == "cpu":
        return blocked_attention(q_hnLd, k_hnLd, v_hnLd, table_h, table_w)
    q, k, v = (x.transpose(0, 1) for x in (q_hnLd, k_hnLd, v_hnLd))
    return folded_attention(q, k, v, table_h, table_w).transpose(1, 2).flatten(2)


def _attend_masked(
    q_mLd: torch.Tensor,
    k_mLd: torch.Tensor,
    v_mLd: torch.Tensor,
    tables_dT: torch.Tensor,
    out_mLd: torch.Tensor,
) -> None:
    """Attend by PyTorch's fused kernel, which adds the terms as a mask: in float32 the fastest of all.

    In bfloat16 its products are several times slower than `_attend_in_strips`.
    """
    m, length, _ = q_mLd.shape
    side = (tables_dT.shape[1] // 2 + 1) // 2
    rel_h, rel_w = offset_terms(q_mLd, tables_dT)
    step = _strip_rows(q_mLd, side)
    terms = q_mLd.new_empty(m * step * side * length)
    k, v = k_mLd[:, None], v_mLd[:, None]
    for row in range(0, side, step):
        rows = slice(row, min(row + step, side))
        tokens = slice(rows.start * side, rows.stop * side)
        shape = (m, 1, tokens.stop - tokens.start, length)
        strip = terms[: m * shape[2] * length].view(shape)
        grid = strip.view(m, -1, side, side, side)
        torch.add(rel_h[:, rows, :, :, None], rel_w[:, rows, :, None, :], out=grid)
        attended = F.scaled_dot_product_attention(q_mLd[:, None, tokens], k, v, attn_mask=strip)
        out_mLd[:, tokens] = attended[:, 0]


def _strip_rows(q_mLd: torch.Tensor, side: int) -> int:
    """Return how many rows of queries are one strip."""
    return max(1, min(side, STRIP_BYTES // (len(q_mLd) * side**3 * q_mLd.element_size())))


def _attend_folded(
    q_mLd: torch.Tensor,
    k_mLd: torch.Tensor,
    v_mLd: torch.Tensor,
    tables_dT: torch.Tensor,
    out_mLd: torch.Tensor,
) -> None:
    """Attend in small squares: a few more columns of q and k cost less than a pass over the logits."""
    q_mLD, k_mLD = fold_offsets(q_mLd, k_mLd, tables_dT)
    weights_mLL = torch.bmm(q_mLD, k_mLD.transpose(1, 2)).softmax(-1)
    torch.bmm(weights_mLL, v_mLd, out=out_mLd)


def _attend_in_strips(
    q_mLd: torch.Tensor,
    k_mLd: torch.Tensor,
    v_mLd: torch.Tensor,
    tables_dT: torch.Tensor,
    out_mLd: torch.Tensor,
) -> None:
    """Attend in large squares: write the terms first, and add the product of q and k onto them."""
    m, length, d = q_mLd.shape
    side = (tables_dT.shape[1] // 2 + 1) // 2
    rel_h, rel_w = offset_terms(q_mLd, tables_dT)
    step = _strip_rows(q_mLd, side)
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
    """Return `plain_attention`, (n, h, L, d), by PyTorch's fused attention.

    It is for GPUs: the terms become further columns of q and k, so that any fused kernel takes them, and no
    logits are ever stored. Its kernels want q, k and v of one
    width, so v is widened by zeros; that costs less than logits in memory.
    """
    n, h, length, d = q_nhLd.shape
    q_mLD, k_mLD = fold_offsets(
        q_nhLd.reshape(n * h, length, d), k_nhLd.reshape(n * h, length, d), offset_tables(table_h, table_w)
    )
    shape = (n, h, length, q_mLD.shape[-1])
    v_nhLD = F.pad(v_nhLd, (0, shape[-1] - d))
    out_nhLD = F.scaled_dot_product_attention(q_mLD.view(shape), k_mLD.view(shape), v_nhLD, scale=1.0)
    return out_nhLD[..., :d]


def fold_offsets(
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


# Upscaling and masks

STRIP_PIXELS = 16384
"""Pixels of the HQ branch's 64 channels that a CPU processes together: 2 MiB in bfloat16."""


def upscale_cells(
    layers: nn.Sequential, x_RC: torch.Tensor, finer: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Return `layers` of tokens (R, C), (R, 2, 2, 2, 2, U): 4 x 4 pixels each, as row, column, row, column.

    `layers`: two 2x2 transposed convolutions of stride 2 with norm and GELU between, and a last GELU or not.
    At stride 2 the 2x2 patches do not overlap, so each convolution is one matrix product of tokens, and
    norm and activation in between depend on no order of pixels. `cells_to_map` puts them in place.
    `finer`: none, or two tensors, added to the first and to the second convolution's result, in their order
    of pixels as `map_to_cells` makes it.
    """
    conv1, norm, activation, conv2, *last = layers
    hidden = _patches(cast(nn.ConvTranspose2d, conv1), x_RC)
    if finer:
        hidden = hidden + finer[0]
    hidden = activation(cast(LayerNorm2d, norm).over_last_axis(hidden))
    cells = _patches(cast(nn.ConvTranspose2d, conv2), hidden.flatten(0, 2)).view(len(x_RC), 2, 2, 2, 2, -1)
    if finer:
        cells = cells + finer[1]
    for layer in last:
        cells = layer(cells)
    return cells


def _patches(conv: nn.ConvTranspose2d, x_RC: torch.Tensor) -> torch.Tensor:
    """Return (R, 2, 2, out), the pixels that a 2x2 transposed convolution of stride 2 makes of each token."""
    channels, out = conv.weight.shape[:2]
    weight = conv.weight.permute(2, 3, 1, 0).reshape(4 * out, channels)
    return F.linear(x_RC, weight, cast(torch.Tensor, conv.bias).repeat(4)).view(-1, 2, 2, out)


def cells_to_map(cells_R2222U: torch.Tensor, grid: int) -> torch.Tensor:
    """Return (B, U, 4G, 4G), channels last in memory, of the cells of B images' tokens in rows."""
    cells_BGG2222U = cells_R2222U.view(-1, grid, grid, *cells_R2222U.shape[1:])
    rows_then_columns = cells_BGG2222U.permute(0, 1, 3, 5, 2, 4, 6, 7)
    return rows_then_columns.reshape(-1, 4 * grid, 4 * grid, cells_R2222U.shape[-1]).permute(0, 3, 1, 2)


def convolve_1x1(conv: nn.Conv2d, x_BHWC: torch.Tensor) -> torch.Tensor:
    """Return a 1 x 1 convolution of a map whose channels are its last axis, (B, H, W, out)."""
    return F.linear(x_BHWC, conv.weight.flatten(1), conv.bias)


def map_to_cells(map_BHWU: torch.Tensor, grid: int) -> torch.Tensor:
    """Return a map of twice or four times the grid's side in the order of `upscale_cells`, an image a row.

    (B, G * G, 2, 2, U) of a map (B, 2G, 2G, U), and (B, G * G, 2, 2, 2, 2, U) of (B, 4G, 4G, U).
    """
    images, side, _, width = map_BHWU.shape
    if side == 2 * grid:
        cells = map_BHWU.view(images, grid, 2, grid, 2, width).transpose(2, 3)
        return cells.reshape(images, grid * grid, 2, 2, width)
    cells = map_BHWU.view(images, grid, 2, 2, grid, 2, 2, width).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return cells.reshape(images, grid * grid, 2, 2, 2, 2, width)


def dot_maskfeature(
    layers: nn.Sequential, upscaled_NUHW: torch.Tensor, vector_NU: torch.Tensor
) -> torch.Tensor:
    """Return vector . layers(upscaled) in fp32, (N, 4G, 4G), without making the U-channel map.

    `layers`: 3x3 convolution, norm, GELU, 3x3 convolution. vector . (last convolution) is a 3x3 convolution
    with one output channel and its own kernel for each prompt: nine products a pixel and prompt, then nine
    shifted sums. `F.fold` adds at the pixel of the tap, a convolution reads from there, hence the flip.
    """
    conv1, norm, activation, conv2 = (cast(nn.Conv2d, layer) for layer in layers)
    N, _, H, W = upscaled_NUHW.shape
    kernel, bias = conv2.weight.float().flip(2, 3), cast(torch.Tensor, conv2.bias).float()
    taps_N9C = torch.einsum("nu,ucyx->nyxc", vector_NU, kernel).reshape(N, 9, -1)
    # Like the pixels; oneDNN is a tenth slower with a kernel in PyTorch's own order.
    kernel_3x3 = conv1.weight.contiguous(memory_format=torch.channels_last)
    hidden = F.conv2d(upscaled_NUHW, kernel_3x3, conv1.bias, padding=1)
    hidden_NLC = hidden.permute(0, 2, 3, 1).flatten(1, 2)
    # In strips that a CPU's inner caches hold: what follows is otherwise a matter of memory, not of sums.
    strips = torch.split(hidden_NLC, STRIP_PIXELS if hidden_NLC.device.type == "cpu" else H * W, dim=1)
    activated = (activation(cast(LayerNorm2d, norm).over_last_axis(strip)) for strip in strips)
    products_N9L = torch.cat([taps_N9C @ strip.float().transpose(1, 2) for strip in activated], dim=2)
    bias_N = vector_NU @ bias
    return F.fold(products_N9L, (H, W), 3, padding=1)[:, 0] + bias_N[:, None, None]


def prompt_by_prompt(
    make: Callable[..., tuple[torch.Tensor, ...]], *inputs_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return `make(*inputs)`, tensors of N rows each; on a CPU without gradients, row by row.

    There the maps of one prompt stay in the caches, those of all do not.
    """
    if inputs_N[0].device.type != "cpu" or torch.is_grad_enabled():
        return make(*inputs_N)
    rows = (make(*(x[n : n + 1] for x in inputs_N)) for n in range(len(inputs_N[0])))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
