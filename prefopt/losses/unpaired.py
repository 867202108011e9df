"""Losses on single completions that somebody called desirable or not."""

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Labelled
from prefopt.domains import Positive

PerCompletion = Float[Tensor, " batch"]


def kto(
    labelled: Labelled,
    *,
    beta: Positive,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
) -> PerCompletion:
    """Kahneman-Tversky optimisation: gains and losses against what the policy gives anyway.

    Ethayarajh et al. 2024 (arXiv:2402.01306). Its reference point z, an estimate of the KL, is a
    mean over the micro-batch's mismatched completions: the result depends on the micro-batch.

    Args:
        labelled: evidence.
        beta: weight of the pull to the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Gradient:
        dL/du = -desirable_weight beta v (1 - v), v = sigmoid(beta (u - z)), or
        undesirable_weight beta w (1 - w), w = sigmoid(beta (z - u)); z carries none

    Optimum:
        None: desirable log-ratios grow with a gradient that vanishes.

    Elsewhere:
        TRL 1.16: KTOTrainer, desirable_weight and undesirable_weight the same; it mismatches with
        the previous row of the micro-batch, this pipeline with the next pair of the step.
        HALOs: kto.
    """
    z = labelled.mismatched.logratio.mean().clamp(min=0).detach()
    u = labelled.completions.logratio
    gain = desirable_weight * (1 - torch.sigmoid(beta * (u - z)))
    loss = undesirable_weight * (1 - torch.sigmoid(beta * (z - u)))
    return torch.where(labelled.desirable, gain, loss)
