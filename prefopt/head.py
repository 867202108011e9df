"""Log-probabilities from hidden states, never holding all of their logits at once."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Logits held at once, as numbers: 256 MiB of float32.
LARGEST = 2**26


def target_logps(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " positions"],
    compute_dtype: torch.dtype,
) -> Float[Tensor, " positions"]:
    """Log-probability of each target under softmax(weight hidden + bias), in float32 nats.

    Logits are made in pieces of at most `LARGEST` numbers and made again for the gradient, so
    memory does not grow with positions times vocabulary; where they fit at once they are kept,
    which is faster.

    Args:
        hidden: what the LM head reads.
        weight: the LM head's.
        bias: likewise, if it has one.
        targets: token ids.
        compute_dtype: of the matrix products.
    """
    if hidden.shape[0] * weight.shape[0] <= LARGEST:
        return -F.cross_entropy(
            _logits(hidden, weight, bias, compute_dtype), targets, reduction="none"
        )
    logps: Tensor = _InPieces.apply(hidden, weight, bias, targets, compute_dtype)
    return logps


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype
) -> Tensor:
    logits = F.linear(_cast(hidden, compute_dtype), _cast(weight, compute_dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if bias is None else logits + bias


def _cast(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """To a low precision, if that is asked for; float32 asks for nothing."""
    return x if compute_dtype == torch.float32 else x.to(compute_dtype)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        rows = max(1, LARGEST // weight.shape[0])
        logps = torch.cat(
            [
                -F.cross_entropy(_logits(h, weight, bias, compute_dtype), t, reduction="none")
                for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
            ]
        )
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.compute_dtype, ctx.rows = compute_dtype, rows
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        (gradient,) = gradients
        into_hidden = torch.empty_like(hidden)
        into_weight = torch.zeros_like(weight)
        into_bias = None if bias is None else torch.zeros_like(bias)
        pieces = zip(
            hidden.split(ctx.rows),
            targets.split(ctx.rows),
            gradient.split(ctx.rows),
            into_hidden.split(ctx.rows),
            strict=True,
        )
        for h, t, g, into in pieces:
            # d logp/d logits = one-hot of the target - softmax.
            slopes = _logits(h, weight, bias, ctx.compute_dtype).softmax(-1).neg_()
            slopes[torch.arange(len(t), device=t.device), t] += 1
            slopes *= g[:, None]
            if into_bias is not None:
                into_bias += slopes.sum(0)
            slopes = _cast(slopes, ctx.compute_dtype)
            into.copy_(slopes @ _cast(weight, slopes.dtype))
            into_weight += slopes.T @ _cast(h, slopes.dtype)
        return into_hidden, into_weight, into_bias, None, None
