"""Every objective by name: `LOSSES[name]`.

What a loss needs beside its arguments is declared here: the batch type that it reads, and its
value where the policy equals the reference, which a training checks at step 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefopt.batches import Pairs
from prefopt.losses import pairwise


@dataclass(frozen=True)
class Loss:
    """An entry of the table.

    Args:
        function: batch and keyword hyperparameters in, one number per example out.
        evidence: the batch type.
        at_reference: its value at policy = reference, from the same hyperparameters.
    """

    function: Callable[..., Any]
    evidence: type
    at_reference: Callable[..., float]


def _dpo_at_reference(*, beta: float, label_smoothing: float = 0.0) -> float:
    return math.log(2)


def _exo_pref_at_reference(*, beta: float, label_smoothing: float) -> float:
    return -math.log(2) - 0.5 * math.log(label_smoothing * (1 - label_smoothing))


LOSSES: dict[str, Loss] = {
    "dpo": Loss(pairwise.dpo, Pairs, _dpo_at_reference),
    "ipo": Loss(pairwise.ipo, Pairs, lambda *, tau: 1 / (4 * tau**2)),
    "f_dpo": Loss(pairwise.f_dpo, Pairs, lambda *, beta, divergence: math.log(2)),
    "exo_pref": Loss(pairwise.exo_pref, Pairs, _exo_pref_at_reference),
    "slic": Loss(pairwise.slic, Pairs, lambda *, beta: 1.0),
}
