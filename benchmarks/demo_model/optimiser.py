"""The optimiser of the demo training: Muon for matrices, AdamW for everything else.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum
by the nearest orthogonal matrix. In a trial of the first stage it took fewer steps than AdamW, and
steps are what a CPU lacks. torch.optim.Muon iterates in bfloat16, which is slow on a CPU without it, so
this one works in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 4
WIDEST = 1024  # a matrix with a longer side costs more to orthogonalise than it gains
NOT_MATRICES = ("rel_pos", "embed", "hyper", "iou_head", "token")


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with all its singular values pushed to about 1 (quintic Newton-Schulz iteration), fp32."""
    a, b, c = NEWTON_SCHULZ
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum SGD on matrices with an orthogonalised step, whose rms is 0.2 `lr`."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002 - the base class has it
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.reshape(weight.shape[0], -1)
                state = self.state[weight]
                velocity = state.setdefault("velocity", torch.zeros_like(gradient))
                velocity.lerp_(gradient, 1 - group["momentum"])
                direction = orthogonalise(gradient.lerp(velocity, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["decay"])
                # An orthogonal m x n matrix has rms max(m, n)^-0.5; the factor makes every step's rms 0.2 lr.
                scale = 0.2 * max(gradient.shape) ** 0.5
                weight.add_(direction.reshape(weight.shape), alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (hidden matrices for Muon, all others for AdamW)."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        hidden = weight.ndim == 2 and min(weight.shape) >= 32 and max(weight.shape) <= WIDEST
        (matrices if hidden and not any(part in name for part in NOT_MATRICES) else others).append(weight)
    return matrices, others
