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
    positions = _read(policy, rows, compute_dtype)
    return positions.by_row(positions.logps())


def token_logps_and_collisions(
    policy: nn.Module, rows: Sequence[Row], *, compute_dtype: torch.dtype = torch.float32
) -> tuple[list[Float[Tensor, " tokens"]], list[Float[Tensor, " tokens"]]]:
    """`token_logps`, and log sum_v pi(v)^2 of the same positions, which carries no gradient.

    The second is the log-probability that two draws of the next token agree.
    """
    positions = _read(policy, rows, compute_dtype)
    with torch.no_grad():
        collisions = (2 * positions.logits.log_softmax(-1)).logsumexp(-1)
    return positions.by_row(positions.logps()), positions.by_row(collisions)


def token_logps_and_kls(
    policy: nn.Module,
    reference: nn.Module,
    rows: Sequence[Row],
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[list[Float[Tensor, " tokens"]], list[Float[Tensor, " tokens"]]]:
    """`token_logps`, and KL(reference || policy) of the next token at the same positions, in nats.

    Over the whole vocabulary; both carry the policy's gradient.
    """
    with torch.no_grad():
        expected = _read(reference, rows, compute_dtype).logits.log_softmax(-1)
    positions = _read(policy, rows, compute_dtype)
    kls = (expected.exp() * (expected - positions.logits.log_softmax(-1))).sum(-1)
    return positions.by_row(positions.logps()), positions.by_row(kls)


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


@dataclass(frozen=True)
class _Positions:
    """What a model says of the next token, at all positions of padded rows from `first` on."""

    logits: Float[Tensor, "positions vocab"]
    targets: Int[Tensor, " positions"]
    rows: Sequence[Row]
    first: int

    def logps(self) -> Float[Tensor, " positions"]:
        # Flat, because a cross-entropy over a strided axis is a fifth slower on a CPU.
        return -F.cross_entropy(self.logits, self.targets, reduction="none")

    def by_row(self, values: Float[Tensor, " positions"]) -> list[Float[Tensor, " tokens"]]:
        """The values at completion tokens, row for row."""
        return [
            value[len(row.prompt) - 1 - self.first : len(row) - 1 - self.first]
            for value, row in zip(values.view(len(self.rows), -1), self.rows, strict=True)
        ]


def _read(policy: nn.Module, rows: Sequence[Row], compute_dtype: torch.dtype) -> _Positions:
    device = next(policy.parameters()).device
    tokens = _right_padded(rows).to(device)
    first = min(len(row.prompt) for row in rows) - 1
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        logits = policy(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
    targets = tokens[:, first + 1 :].flatten()
    return _Positions(logits[:, :-1].flatten(0, 1).float(), targets, rows, first)


def _right_padded(rows: Sequence[Row]) -> Int[Tensor, "batch time"]:
    tokens = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor([*row.prompt, *row.completion])
    return tokens
