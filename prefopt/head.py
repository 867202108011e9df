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
    memory does not grow with positions times vocabulary. Where they fit in one piece they are kept
    and turned into their own gradient in place, which is faster and takes no second buffer.

    Args:
        hidden: what the LM head reads.
        weight: the LM head's.
        bias: likewise, if it has one.
        targets: token ids.
        compute_dtype: of the matrix products.
    """
    logps: Tensor = _TargetLogps.apply(hidden, weight, bias, targets, compute_dtype)
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


class _TargetLogps(torch.autograd.Function):
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
        kept = None
        logps: list[Tensor] = []
        norms: list[Tensor] = []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _logits(h, weight, bias, compute_dtype)
            norms.append(_log_normalisers(logits))
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - norms[-1])
            kept = logits if len(hidden) <= rows else None
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        ctx.compute_dtype, ctx.rows, ctx.kept = compute_dtype, rows, kept
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        (gradient,) = gradients
        # A frozen head takes no gradient, and its product is not made.
        into_hidden = torch.empty_like(hidden)
        into_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        into_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        pieces = zip(
            hidden.split(ctx.rows),
            targets.split(ctx.rows),
            norms.split(ctx.rows),
            gradient.split(ctx.rows),
            into_hidden.split(ctx.rows),
            strict=True,
        )
        # They become slopes below; a second backward pass makes them again.
        kept, ctx.kept = ctx.kept, None
        for h, t, norm, g, into in pieces:
            logits = _logits(h, weight, bias, ctx.compute_dtype) if kept is None else kept
            # d logp/d logits = one-hot of the target - softmax.
            slopes = logits.sub_(norm[:, None]).exp_().mul_(-g[:, None])
            slopes[torch.arange(len(t), device=t.device), t] += g
            if into_bias is not None:
                into_bias += slopes.sum(0)
            slopes = _cast(slopes, ctx.compute_dtype)
            into.copy_(slopes @ _cast(weight, slopes.dtype))
            if into_weight is not None and slopes.dtype == into_weight.dtype:
                into_weight.addmm_(slopes.T, h)  # takes no buffer for the product
            elif into_weight is not None:
                into_weight += slopes.T @ _cast(h, slopes.dtype)
        return into_hidden, into_weight, into_bias, None, None


def _log_normalisers(logits: Tensor) -> Tensor:
    """log sum exp of each row, a few rows at a time, because exponentials take a buffer."""
    rows = max(1, LARGEST // 16 // logits.shape[1])
    return torch.cat([piece.logsumexp(-1) for piece in logits.split(rows)])
