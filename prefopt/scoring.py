"""Log-probabilities of completions: the one place where a language model is read.

Rows are right-padded. Attention is causal, so padding lies in nobody's past and needs no mask.
The LM head runs from the first completion position of the micro-batch on, and log-probabilities
are float32 nats whatever the model's dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefopt.packing import micro_batches


@dataclass(frozen=True)
class Row:
    """A completion of a prompt, as token ids; both have at least one token."""

    prompt: Sequence[int]
    completion: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def token_logps(
    policy: nn.Module, rows: Sequence[Row], *, compute_dtype: torch.dtype = torch.float32
) -> list[Float[Tensor, " tokens"]]:
    """Log-probability of every completion token, row for row; carries the gradient.

    Args:
        policy: a Hugging Face causal LM.
        rows: one micro-batch.
        compute_dtype: dtype of the matrix products; parameters and results stay as they are.
    """
    device = next(policy.parameters()).device
    tokens = _right_padded(rows).to(device)
    first = min(len(row.prompt) for row in rows) - 1
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        logits = policy(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
    targets = tokens[:, first + 1 :]
    # Flat, because a cross-entropy over a strided axis is a fifth slower on a CPU.
    nats = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    logps = -nats.view_as(targets)
    return [
        logp[len(row.prompt) - 1 - first : len(row) - 1 - first]
        for logp, row in zip(logps, rows, strict=True)
    ]


@torch.no_grad()
def score(
    policy: nn.Module,
    rows: Sequence[Row],
    *,
    token_budget: int,
    compute_dtype: torch.dtype,
    progress: Callable[[int], object],
) -> list[list[float]]:
    """Log-probability of every completion token of every row, without gradient, in row order.

    Args:
        policy: a Hugging Face causal LM.
        rows: any number.
        token_budget: of a micro-batch, padding included.
        compute_dtype: as in `token_logps`.
        progress: told the number of rows done, micro-batch by micro-batch.
    """
    logps: list[list[float]] = [[] for _ in rows]
    lengths = [len(row) for row in rows]
    for batch in micro_batches(range(len(rows)), lengths, token_budget):
        scored = token_logps(policy, [rows[i] for i in batch], compute_dtype=compute_dtype)
        for i, logp in zip(batch, scored, strict=True):
            logps[i] = logp.tolist()
        progress(len(batch))
    return logps


def _right_padded(rows: Sequence[Row]) -> Int[Tensor, "batch time"]:
    tokens = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor([*row.prompt, *row.completion])
    return tokens
