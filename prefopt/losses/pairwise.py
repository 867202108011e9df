"""Losses on pairs with a reference: h is the margin, u_w and u_l the log-ratios of the two sides.

Each returns one loss per pair, in the loss's own units, and is invariant to adding a constant to
policy and reference log-probabilities of the same completion.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Pairs
from prefopt.divergences import Divergence
from prefopt.domains import OpenSmoothing, Positive, Smoothing

PerPair = Float[Tensor, " batch"]


def dpo(pairs: Pairs, *, beta: Positive, label_smoothing: Smoothing = 0.0) -> PerPair:
    """-log sigmoid(beta h); with label smoothing, conservative DPO (cDPO).

    Rafailov et al. 2023 (arXiv:2305.18290); the smoothing is Mitchell's note of 2023 on cDPO.

    Args:
        pairs: evidence.
        beta: weight of the pull to the reference.
        label_smoothing: share of labels believed flipped; the gradient vanishes where
            sigmoid(beta h) = 1 - label_smoothing.
    """
    logits = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(pairs: Pairs, *, tau: Positive) -> PerPair:
    """(h - 1/(2 tau))^2, on summed log-probabilities as in the paper, not per token as elsewhere.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17.
    """
    return (pairs.margin - 1 / (2 * tau)) ** 2


def f_dpo(pairs: Pairs, *, beta: Positive, divergence: Divergence) -> PerPair:
    """-log sigmoid(beta f'(e^u_w) - beta f'(e^u_l)): DPO with D_f in the place of the reverse KL.

    Wang et al. 2023 (arXiv:2309.16240); f need not be convex: Pipano et al. 2026
    (arXiv:2602.06788), whose SquaredPO is the divergence `squared_log`.
    """
    chosen = divergence.derivative(pairs.chosen.logratio)
    rejected = divergence.derivative(pairs.rejected.logratio)
    return -F.logsigmoid(beta * (chosen - rejected))


def exo_pref(pairs: Pairs, *, beta: Positive, label_smoothing: OpenSmoothing) -> PerPair:
    """KL(q || p) of q = (sigmoid(beta h), sigmoid(-beta h)) to p = (1 - eps, eps).

    Ji et al. 2024 (arXiv:2402.00856), with eps the label smoothing: the reverse KL where cDPO
    has the forward one. At eps = 0 it would be infinite.
    """
    logits = beta * pairs.margin
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def slic(pairs: Pairs, *, beta: Positive) -> PerPair:
    """max(0, 1 - beta h): the hinge on log-ratios.

    Zhao et al. 2023 (arXiv:2305.10425), in the log-ratio form of RSO, Liu et al. 2023
    (arXiv:2309.06657).
    """
    return F.relu(1 - beta * pairs.margin)
