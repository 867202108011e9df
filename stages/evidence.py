"""From the tables of labels to the batch that a loss reads, its log-probabilities freshly computed.

A pair's two sides and a ranking's K completions are rows of `completions`. What a loss needs beyond
their summed log-probabilities is computed here, from the policy and, where it must be alive, the
reference.
"""

import array
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.batches import (
    Labelled,
    Pairs,
    Rankings,
    Revisions,
    Scored,
    SequentialPairs,
    SharedPairs,
    WeightedPairs,
)
from prefopt.packing import Row
from prefopt.scoring import (
    token_logps,
    token_logps_and_collisions,
    token_logps_and_kls,
)
from stages import models
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    RANKINGS,
    RANKINGS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SFT,
    Column,
    map_table,
    rows_of_split,
)
from stages.rows import Rows
from stages.store import grouped

Logps = list[Tensor]  # one tensor of token log-probabilities a row

AUDIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # nats a token

# Evidence for which the stored log-probabilities of the reference are not enough.
READS_LIVE_REFERENCE = ("SequentialPairs", "Labelled")


@dataclass(frozen=True)
class Models:
    """The policy that is trained; the frozen reference, where the evidence needs it alive."""

    policy: models.PreTrainedModel
    reference: models.PreTrainedModel | None
    compute_dtype: torch.dtype


class Evidence:
    """Completions with their reference, and the pairs and rankings that point at them."""

    def __init__(self) -> None:
        completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
        self.rows = Rows(completions["prompt"], completions["completion"])
        self.pairs = map_table(PAIRS, PAIRS_SCHEMA)
        self.revisions = map_table(REVISIONS, REVISIONS_SCHEMA)
        self.reference = map_table(REFERENCE, REFERENCE_SCHEMA)["logps"]
        if len(self.reference) != len(self.rows):
            raise ValueError(
                f"{REFERENCE}: not row for row with {COMPLETIONS}, got {len(self.reference)} rows "
                f"for {len(self.rows)}; run `dvc repro reference`"
            )

    @functools.cached_property
    def rankings(self) -> dict[str, Column]:
        return map_table(RANKINGS, RANKINGS_SCHEMA)

    def pairs_of(self, split: str) -> range:
        """The pairs of the training or of the validation split."""
        return rows_of_split(self.pairs, split)

    def examples_of(self, kind: str, split: str) -> range:
        """What batches of type `kind` are made of: pairs of a split, or rankings."""
        return rows_of_split(self.rankings if kind == "Rankings" else self.pairs, split)

    def sides(self, pairs: Sequence[int]) -> list[int]:
        """Rows of the chosen completions of the pairs, then of the rejected ones."""
        return [self.pairs[side][pair] for side in ("chosen", "rejected") for pair in pairs]

    def numbers(self, kind: str, pairs: Sequence[int]) -> list[int]:
        """Rows that a batch of type `kind` scores.

        One column of the pairs after the other; of rankings one ranking after the other.
        """
        if kind == "Rankings":
            return [row for ranking in pairs for row in self.rankings["completions"][ranking]]
        if kind != "Revisions":
            return self.sides(pairs)
        return self.sides(pairs) + [
            self.revisions[side][pair] for side in REVISIONS_SCHEMA.names for pair in pairs
        ]

    def rows_of(self, kind: str, pair: int) -> list[Row]:
        """What a pair adds to a micro-batch of batches of type `kind`."""
        return [self.rows[row] for row in self.numbers(kind, [pair])]

    def num_tokens(self, kind: str, pairs: Sequence[int]) -> int:
        """Tokens of the rows of the pairs, prompts included, padding excluded."""
        return sum(len(self.rows[row]) for row in self.numbers(kind, pairs))

    def num_chosen_tokens(self, pairs: Sequence[int]) -> int:
        """Completion tokens of the chosen sides."""
        return sum(len(self.rows[self.pairs["chosen"][pair]].completion) for pair in pairs)

    def batch(self, kind: str, pairs: Sequence[int], step: Sequence[int], models: Models) -> Any:
        """The batch of type `kind` that these pairs of a step make; carries the gradient."""
        return ASSEMBLE[kind](self, pairs, step, models)

    @torch.no_grad()
    def audit(self, models: Models, num_prompts: int, seed: int) -> float:
        """Score prompts at random again, by the policy before its first step; nats of deviation.

        Raises:
            ValueError: if a stored log-probability is missing, or off by more than rounding.
        """
        starts = array.array("q")
        row = 0
        for group in grouped(self.rows):
            starts.append(row)
            for stored in group.rows:
                if len(stored.completion) != len(self.reference[row]):
                    raise ValueError(
                        f"{REFERENCE}: row {row} has {len(self.reference[row])} log-probabilities, "
                        f"got a completion of {len(stored.completion)} tokens; "
                        "run `dvc repro --force reference`"
                    )
                row += 1
        drawn = random.Random(seed).sample(starts, min(num_prompts, len(starts)))
        worst = 0.0
        for start in drawn:
            rows = next(grouped(self.rows.following(start))).rows
            found = token_logps(models.policy, rows, compute_dtype=models.compute_dtype)
            for row, logps in enumerate(found, start):
                expected = torch.tensor(self.reference[row], device=logps.device)
                worst = max(worst, (logps - expected).abs().max().item())
        if not worst <= AUDIT_TOLERANCE[models.compute_dtype]:
            raise ValueError(
                f"{REFERENCE}: {len(drawn)} prompts scored again by {SFT} differ, got up to "
                f"{worst:.3g} nats a token; it was made by other weights or another dtype: run "
                "`dvc repro --force reference`"
            )
        return worst

    def paired(
        self, pairs: Sequence[int], logps: Logps, tokens: Sequence[int] | None = None
    ) -> Pairs:
        """Pairs of summed log-probabilities.

        Args:
            pairs: which.
            logps: of their chosen, then of their rejected completions, token by token.
            tokens: only so many tokens of each completion, in the same order.
        """
        chosen, rejected = self.scored(self.sides(pairs), logps, 2, tokens)
        preference = [self.pairs["preference"][pair] for pair in pairs]
        return Pairs(chosen, rejected, torch.tensor(preference, device=logps[0].device))

    def scored(
        self,
        rows: Sequence[int],
        logps: Logps,
        num_columns: int,
        tokens: Sequence[int] | None = None,
    ) -> list[Scored]:
        """Summed log-probabilities of rows beside their reference's, cut into equal columns.

        Args:
            rows: of `completions`.
            logps: theirs, token by token.
            num_columns: how many.
            tokens: only so many tokens of each completion.
        """
        tokens = [len(logp) for logp in logps] if tokens is None else tokens
        sums = [logp[:count].sum() for logp, count in zip(logps, tokens, strict=True)]
        reference = [
            sum(self.reference[row][:count]) for row, count in zip(rows, tokens, strict=True)
        ]
        whole = Scored(
            logp=torch.stack(sums),
            reference_logp=torch.tensor(reference, device=logps[0].device),
            tokens=torch.tensor(tokens, device=logps[0].device),
        )
        length = len(rows) // num_columns
        return [_cut(whole, slice(start, start + length)) for start in range(0, len(rows), length)]


def _cut(scored: Scored, part: slice) -> Scored:
    return Scored(scored.logp[part], scored.reference_logp[part], scored.tokens[part])


def _pairs(evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models) -> Pairs:
    rows = [evidence.rows[row] for row in evidence.sides(pairs)]
    return evidence.paired(
        pairs, token_logps(models.policy, rows, compute_dtype=models.compute_dtype)
    )


def _shared_pairs(
    evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models
) -> SharedPairs:
    rows = [evidence.rows[row] for row in evidence.sides(pairs)]
    logps = token_logps(models.policy, rows, compute_dtype=models.compute_dtype)
    half = len(pairs)
    shorter = [min(len(a), len(b)) for a, b in zip(logps[:half], logps[half:], strict=True)]
    return SharedPairs(
        whole=evidence.paired(pairs, logps),
        shared=evidence.paired(pairs, logps, tokens=[*shorter, *shorter]),
    )


def _weighted_pairs(
    evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models
) -> WeightedPairs:
    rows = [evidence.rows[row] for row in evidence.sides(pairs)]
    logps, collisions = token_logps_and_collisions(
        models.policy, rows, compute_dtype=models.compute_dtype
    )
    means = torch.stack(
        [
            (logp.detach() - collision).mean()
            for logp, collision in zip(logps, collisions, strict=True)
        ]
    )
    chosen, rejected = means.chunk(2)
    return WeightedPairs(evidence.paired(pairs, logps), (chosen + rejected).clamp(max=0).exp())


def _sequential_pairs(
    evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models
) -> SequentialPairs:
    assert models.reference is not None
    rows = [evidence.rows[row] for row in evidence.sides(pairs)]
    logps, kls = token_logps_and_kls(
        models.policy, models.reference, rows, compute_dtype=models.compute_dtype
    )
    chosen_kl, rejected_kl = torch.stack([kl.sum() for kl in kls]).chunk(2)
    return SequentialPairs(evidence.paired(pairs, logps), chosen_kl, rejected_kl)


def _labelled(
    evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models
) -> Labelled:
    """Chosen completions are desirable, rejected ones are not.

    The mismatched completion of a row is the next pair's of the step, on the same side.
    """
    assert models.reference is not None
    both = _pairs(evidence, pairs, step, models)
    following = {pair: step[(place + 1) % len(step)] for place, pair in enumerate(step)}
    rows = evidence.sides(pairs)
    others = evidence.sides([following[pair] for pair in pairs])
    mismatched = [
        Row(evidence.rows[row].prompt, evidence.rows[other].completion)
        for row, other in zip(rows, others, strict=True)
    ]
    with torch.no_grad():
        logp, reference_logp = (
            torch.stack(
                [
                    logps.sum()
                    for logps in token_logps(model, mismatched, compute_dtype=models.compute_dtype)
                ]
            )
            for model in (models.policy, models.reference)
        )
    tokens = torch.tensor([len(row.completion) for row in mismatched], device=logp.device)
    return Labelled(
        completions=Scored(
            *(
                torch.cat([getattr(both.chosen, name), getattr(both.rejected, name)])
                for name in ("logp", "reference_logp", "tokens")
            )
        ),
        desirable=torch.arange(len(rows), device=logp.device) < len(pairs),
        mismatched=Scored(logp, reference_logp, tokens),
    )


def _revisions(
    evidence: Evidence, pairs: Sequence[int], step: Sequence[int], models: Models
) -> Revisions:
    numbers = evidence.numbers("Revisions", pairs)
    rows = [evidence.rows[row] for row in numbers]
    logps = token_logps(models.policy, rows, compute_dtype=models.compute_dtype)
    return Revisions(*evidence.scored(numbers, logps, 2 + len(REVISIONS_SCHEMA)))


def _rankings(
    evidence: Evidence, rankings: Sequence[int], step: Sequence[int], models: Models
) -> Rankings:
    numbers = evidence.numbers("Rankings", rankings)
    rows = [evidence.rows[row] for row in numbers]
    logps = token_logps(models.policy, rows, compute_dtype=models.compute_dtype)
    (flat,) = evidence.scored(numbers, logps, 1)
    rewards = torch.tensor(
        [evidence.rankings["rewards"][ranking] for ranking in rankings], device=flat.logp.device
    )
    return Rankings(
        Scored(*(x.view_as(rewards) for x in (flat.logp, flat.reference_logp, flat.tokens))),
        rewards,
    )


Assembler = Callable[[Evidence, Sequence[int], Sequence[int], Models], Any]
ASSEMBLE: dict[str, Assembler] = {
    "Pairs": _pairs,
    "SharedPairs": _shared_pairs,
    "WeightedPairs": _weighted_pairs,
    "SequentialPairs": _sequential_pairs,
    "Labelled": _labelled,
    "Revisions": _revisions,
    "Rankings": _rankings,
}


def table_of(kind: str) -> Path:
    """The table whose rows are the examples of batches of type `kind`."""
    return RANKINGS if kind == "Rankings" else PAIRS


def pairs_within(batch: Any) -> Pairs:
    """The plain pairs inside a batch; of rankings the best and the worst by reward."""
    match batch:
        case Pairs():
            return batch
        case SharedPairs(whole=pairs) | WeightedPairs(pairs=pairs) | SequentialPairs(pairs=pairs):
            return pairs
        case Labelled(completions=completions):
            half = len(completions.logp) // 2
            return Pairs(
                chosen=_cut(completions, slice(half)),
                rejected=_cut(completions, slice(half, None)),
                preference=torch.ones_like(completions.logp[:half]),
            )
        case Rankings(completions=completions, rewards=rewards):
            chosen, rejected = (
                Scored(
                    *(
                        x.gather(-1, place).squeeze(-1)
                        for x in (completions.logp, completions.reference_logp, completions.tokens)
                    )
                )
                for place in (rewards.argmax(-1, keepdim=True), rewards.argmin(-1, keepdim=True))
            )
            return Pairs(chosen, rejected, torch.ones_like(chosen.logp))
        case Revisions(chosen=chosen, rejected=rejected):
            return Pairs(chosen, rejected, torch.ones_like(chosen.logp))
        case _:
            raise TypeError(f"no pairs in a {type(batch).__name__}")
