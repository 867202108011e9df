"""Log-probabilities of completions: the one place where a language model is read.

Where the model attends through `prefopt.attention`, a micro-batch is one packed row: a prompt that
several completions share is computed once, nothing is padded, and only positions that predict a
completion's token reach the LM head. Other models get right-padded rows; attention is causal, so
padding lies in nobody's past. Log-probabilities are float32 nats whatever the model's dtype.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefopt.attention import NAME
from prefopt.head import target_logps
from prefopt.packing import Layout, Row, micro_batches, packed, slots_of

# A packed row must score as padded ones do, up to rounding.
SELF_CHECK_TOLERANCE = 1e-3


def token_logps(
    policy: nn.Module, rows: Sequence[Row], *, compute_dtype: torch.dtype = torch.float32
) -> list[Float[Tensor, " tokens"]]:
    """Log-probability of every completion token, row for row; carries the gradient.

    Args:
        policy: a Hugging Face causal LM.
        rows: one micro-batch.
        compute_dtype: dtype of the matrix products; parameters and results stay as they are.
    """
    ways = _ways(policy)
    if ways.packed and ways.plain_head:
        layout = packed(rows).to(next(policy.parameters()).device)
        logps = _packed_logps(policy, layout, compute_dtype)
        return [logps[span] for span in layout.spans()]
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
        token_budget: of a micro-batch.
        compute_dtype: as in `token_logps`.
        progress: told the number of rows done, micro-batch by micro-batch.
    """
    logps: list[list[float]] = [[] for _ in rows]
    for batch in batches(policy, range(len(rows)), lambda row: [rows[row]], token_budget):
        scored = token_logps(policy, [rows[i] for i in batch], compute_dtype=compute_dtype)
        for i, logp in zip(batch, scored, strict=True):
            logps[i] = logp.tolist()
        progress(len(batch))
    return logps


def batches(
    policy: nn.Module,
    examples: Sequence[int],
    rows_of: Callable[[int], Sequence[Row]],
    token_budget: int,
) -> list[list[int]]:
    """Cut examples into micro-batches of at most `token_budget` tokens, as this policy reads them.

    Args:
        policy: a Hugging Face causal LM.
        examples: numbers.
        rows_of: an example's rows, which stay together.
        token_budget: slots of a packed row, or tokens of padded ones. An example that needs more
            makes a micro-batch of its own.
    """
    if packs(policy):
        return list(_packed_batches(examples, rows_of, token_budget))
    lengths = {i: len(rows_of(i)) * max(map(len, rows_of(i))) for i in examples}
    return list(micro_batches(examples, lengths, token_budget))


def _packed_batches(
    examples: Sequence[int], rows_of: Callable[[int], Sequence[Row]], token_budget: int
) -> list[list[int]]:
    cuts: list[list[int]] = []
    used = token_budget
    for example in examples:
        slots = slots_of(rows_of(example))
        if used + slots > token_budget:
            cuts.append([])
            used = 0
        cuts[-1].append(example)
        used += slots
    return cuts


@dataclass(frozen=True)
class _Ways:
    """How a policy may be read, found out once on a few tokens.

    Args:
        packed: it may be given packed rows.
        plain_head: its logits are its LM head's product with its hidden states, nothing else.
    """

    packed: bool
    plain_head: bool


_WAYS: weakref.WeakKeyDictionary[nn.Module, _Ways] = weakref.WeakKeyDictionary()


def packs(policy: nn.Module) -> bool:
    """Whether the policy may be given packed rows: tried once, on a few tokens.

    Its layers must all attend by the layout and give what padded rows give; a model whose layers
    keep a state, or make positions and masks their own way, does not, and a warning says why.
    """
    return _ways(policy).packed


def _ways(policy: nn.Module) -> _Ways:
    if _hugging_face(policy).config._attn_implementation != NAME:
        return _Ways(packed=False, plain_head=False)
    if policy not in _WAYS:
        _WAYS[policy] = _tried(policy)
    return _WAYS[policy]


@torch.no_grad()
def _tried(policy: nn.Module) -> _Ways:
    config = _hugging_face(policy).config.get_text_config()
    words = [(7 * i + 3) % config.vocab_size for i in range(24)]
    rows = [
        Row(words[:5], words[5:9]),
        Row(words[:5], words[9:16]),
        Row(words[16:18], words[18:19]),
        Row(words[16:18], words[19:24]),
    ]
    layout = packed(rows).to(next(policy.parameters()).device)
    try:
        expected = _padded(policy, rows, torch.float32)
        found = _packed(policy, layout, torch.float32)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        return _refused(policy, f"it refuses them ({error})")
    difference = (found.logps() - torch.cat(expected.by_row(expected.logps()))).abs().max()
    if layout.calls != config.num_hidden_layers or not difference <= SELF_CHECK_TOLERANCE:
        return _refused(
            policy,
            f"{layout.calls} of {config.num_hidden_layers} layers attend by them, scores differ by "
            f"{difference:.2g} nats",
        )
    through_head = _packed_logps(policy, layout, torch.float32)
    plain = bool((through_head - found.logps()).abs().max() <= SELF_CHECK_TOLERANCE)
    # Small logits pass under a soft cap unchanged, large ones do not.
    capped = getattr(config, "final_logit_softcapping", None) is not None
    return _Ways(packed=True, plain_head=plain and not capped)


def _refused(policy: nn.Module, reason: str) -> _Ways:
    warnings.warn(
        f"{type(policy).__name__} cannot be given packed rows: {reason}; it reads padded ones, "
        "which are slower and as exact",
        stacklevel=2,
    )
    return _Ways(packed=False, plain_head=False)


@dataclass(frozen=True)
class _Positions:
    """What a model says of the next token where completions' tokens follow, and perhaps elsewhere.

    Args:
        logits: position by position.
        targets: the tokens that follow.
        spans: where each row's completion lies among them.
    """

    logits: Float[Tensor, "positions vocab"]
    targets: Int[Tensor, " positions"]
    spans: list[slice]

    def logps(self) -> Float[Tensor, " positions"]:
        return -F.cross_entropy(self.logits, self.targets, reduction="none")

    def by_row(self, values: Float[Tensor, " positions"]) -> list[Float[Tensor, " tokens"]]:
        """The values at completion tokens, row for row."""
        return [values[span] for span in self.spans]


def _read(policy: nn.Module, rows: Sequence[Row], compute_dtype: torch.dtype) -> _Positions:
    if packs(policy):
        layout = packed(rows).to(next(policy.parameters()).device)
        return _packed(policy, layout, compute_dtype)
    return _padded(policy, rows, compute_dtype)


def _packed(policy: nn.Module, layout: Layout, compute_dtype: torch.dtype) -> _Positions:
    logits = _forward(
        policy,
        compute_dtype,
        input_ids=layout.tokens[None],
        position_ids=layout.positions[None],
        logits_to_keep=layout.predictors,
        layout=layout,
    ).logits
    return _Positions(_precise(logits[0]), layout.targets, layout.spans())


def _packed_logps(
    policy: nn.Module, layout: Layout, compute_dtype: torch.dtype
) -> Float[Tensor, " targets"]:
    """As `_packed(...).logps()`, without all of its logits at once."""
    hidden = _forward(
        _hugging_face(policy).get_decoder(),
        compute_dtype,
        input_ids=layout.tokens[None],
        position_ids=layout.positions[None],
        layout=layout,
    ).last_hidden_state[0]
    head = _hugging_face(policy).get_output_embeddings()
    return target_logps(
        hidden.index_select(0, layout.predictors),
        head.weight,
        getattr(head, "bias", None),
        layout.targets,
        compute_dtype,
    )


def _padded(policy: nn.Module, rows: Sequence[Row], compute_dtype: torch.dtype) -> _Positions:
    tokens = _right_padded(rows).to(next(policy.parameters()).device)
    first = min(len(row.prompt) for row in rows) - 1
    logits = _forward(
        policy, compute_dtype, input_ids=tokens, logits_to_keep=tokens.shape[1] - first
    ).logits
    time = tokens.shape[1] - first - 1
    spans = [
        slice(i * time + len(row.prompt) - 1 - first, i * time + len(row) - 1 - first)
        for i, row in enumerate(rows)
    ]
    return _Positions(
        _precise(logits[:, :-1].flatten(0, 1)), tokens[:, first + 1 :].flatten(), spans
    )


def _forward(model: nn.Module, compute_dtype: torch.dtype, **inputs: Any) -> Any:
    device = next(model.parameters()).device
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        return model(use_cache=False, **inputs)


def _hugging_face(policy: nn.Module) -> Any:
    """The policy with what a Hugging Face causal LM has beyond a module."""
    return policy


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _right_padded(rows: Sequence[Row]) -> Int[Tensor, "batch time"]:
    tokens = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor([*row.prompt, *row.completion])
    return tokens
