"""Losses on pairs that read the policy alone: log-probabilities, not log-ratios.

Each returns one loss per pair, in nats or in the loss's own units. Nothing holds the policy to a
reference but the learning rate and the likelihood terms.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Pairs
from prefopt.domains import NonNegative, Positive

PerPair = Float[Tensor, " batch"]

# log(1 - p) is infinite at p = 1; a mean log-probability nearer to 0 is taken for this.
SMALLEST_NATS = 1e-6


def simpo(pairs: Pairs, *, beta: Positive, gamma: NonNegative) -> PerPair:
    """Simple preference optimisation: log-probabilities per token, with a target margin.

    Meng et al. 2024 (arXiv:2405.14734).

    Args:
        pairs: evidence.
        beta: scale of the mean log-probability, 2 to 10 in the paper.
        gamma: target margin, in units of the logits.

    Optimum:
        None: mean log-probabilities part for ever.

    Elsewhere:
        TRL 1.16, experimental CPOTrainer: loss_type simpo, simpo_gamma = gamma, and cpo_alpha = 0
        or an NLL is added.
        SimPO's repository and open-instruct: gamma_beta_ratio = gamma/beta.
    """
    return -F.logsigmoid(beta * (pairs.chosen.mean_logp - pairs.rejected.mean_logp) - gamma)


def cpo(pairs: Pairs, *, beta: Positive, nll_weight: NonNegative = 1.0) -> PerPair:
    """Contrastive preference optimisation: DPO with a uniform reference, and the chosen's NLL.

    Xu et al. 2024 (arXiv:2401.08417); the NLL is per token here, as in every implementation.

    Args:
        pairs: evidence.
        beta: scale of the log-probabilities.
        nll_weight: weight of the chosen completion's mean NLL.

    Optimum:
        None in closed form.

    Elsewhere:
        TRL 1.16, experimental CPOTrainer: loss_type sigmoid, cpo_alpha = nll_weight, the NLL
        averaged over all tokens of a micro-batch, so that its result depends on the batch.
    """
    contrast = -F.logsigmoid(beta * (pairs.chosen.logp - pairs.rejected.logp))
    return contrast - nll_weight * pairs.chosen.mean_logp


def orpo(pairs: Pairs, *, odds_weight: Positive) -> PerPair:
    """Odds-ratio preference optimisation: the chosen's NLL, and the log-odds of the two sides.

    Hong et al. 2024 (arXiv:2403.07691); P is the exponential of the mean log-probability.

    Args:
        pairs: evidence.
        odds_weight: lambda, weight of the odds ratio.

    Optimum:
        None in closed form.

    Elsewhere:
        TRL 1.16, experimental ORPOTrainer: beta = odds_weight, the NLL averaged over all tokens of
        a micro-batch, those of prompts included but for the first.
    """
    odds = log_odds(pairs.chosen.mean_logp) - log_odds(pairs.rejected.mean_logp)
    return -pairs.chosen.mean_logp - odds_weight * F.logsigmoid(odds)


def slic(pairs: Pairs, *, delta: Positive, nll_weight: NonNegative) -> PerPair:
    """Sequence likelihood calibration: a hinge on log-probabilities, and the chosen's NLL.

    Zhao et al. 2023 (arXiv:2305.10425), SLiC-HF, with the chosen completion as its target.

    Args:
        pairs: evidence.
        delta: margin in nats.
        nll_weight: lambda, weight of the chosen completion's NLL, summed over its tokens.

    Optimum:
        Without the NLL, any policy whose chosen lead by delta nats.

    Elsewhere:
        HALOs: slic. DPOTrainer's hinge in TRL is another loss, `hinge` here; its experimental
        CPOTrainer's, with cpo_alpha = 0, is beta times this with delta = 1/beta and no NLL.
    """
    contrast = F.relu(delta - pairs.chosen.logp + pairs.rejected.logp)
    return contrast - nll_weight * pairs.chosen.logp


def preferred_ft(pairs: Pairs) -> PerPair:
    """Fine-tuning on the preferred: the chosen completion's NLL alone.

    Rafailov et al. 2023 (arXiv:2305.18290), where it is the baseline Preferred-FT. Summed over a
    completion's tokens, so that every token weighs the same, as it does in SFT: a step's gradient
    is that of SFT's loss times the mean number of chosen tokens.

    Args:
        pairs: evidence, of which the rejected side is only measured.

    Optimum:
        The distribution that the chosen completions come from.

    Elsewhere:
        DPO's repository: loss sft. EXO's paper: preferred-FT.
    """
    return -pairs.chosen.logp


def log_odds(mean_logp: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """log(P/(1 - P)) of P = exp(mean_logp)."""
    nats = mean_logp.clamp(max=-SMALLEST_NATS)
    return nats - torch.log(-torch.expm1(nats))
