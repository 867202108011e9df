"""Losses on pairs with a reference: h is the margin, u_w and u_l the log-ratios of the two sides.

Each returns one loss per pair, in the loss's own units, and is invariant to adding a constant to
policy and reference log-probabilities of the same completion.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Pairs, SequentialPairs, SharedPairs, WeightedPairs
from prefopt.divergences import DIVERGENCES
from prefopt.domains import DPOInducing, NonNegative, OpenSmoothing, Positive, Share, Smoothing
from prefopt.psi import Psi

PerPair = Float[Tensor, " batch"]


def dpo(pairs: Pairs, *, beta: Positive, label_smoothing: Smoothing = 0.0) -> PerPair:
    """Direct preference optimisation; with label smoothing, conservative DPO (cDPO).

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; the smoothing is Mitchell's note of 2023 on
    cDPO, eq. 3.

    Args:
        pairs: evidence.
        beta: weight of the pull to the reference.
        label_smoothing: share of labels believed flipped.

    Optimum:
        pi_ref exp(r/beta), normalised, r the Bradley-Terry reward of the preferences. A pair that
        is never contradicted pushes h to infinity; smoothing stops it at
        beta h = log((1 - label_smoothing)/label_smoothing).

    Elsewhere:
        TRL 1.16: loss_type sigmoid, which ignores label_smoothing without a word since 0.29; that
        of its experimental CPOTrainer, without a reference, heeds it.
        HALOs: dpo, and cdpo with epsilon.
        OpenRLHF: label_smoothing as here.
        EXO's repository: dpo-pref.
    """
    logits = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def rdpo(pairs: Pairs, *, beta: Positive, label_smoothing: Smoothing) -> PerPair:
    """Robust DPO: the estimate of DPO's clean loss from labels of which a known share is flipped.

    Chowdhury et al. 2024 (arXiv:2403.00409).

    Args:
        pairs: evidence.
        beta: weight of the pull to the reference.
        label_smoothing: share of flipped labels; unlike cDPO's, its expectation over flips is DPO.

    Optimum:
        DPO's on the labels before they were flipped, in expectation.

    Elsewhere:
        TRL 1.16: loss_type robust, label_smoothing the same.
    """
    logits = beta * pairs.margin
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    return (clean + label_smoothing * F.logsigmoid(-logits)) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, tau: Positive) -> PerPair:
    """Identity preference optimisation: a regression of the margin to 1/(2 tau).

    Azar et al. 2023 (arXiv:2310.12036), eq. 17.

    Optimum:
        pi_ref exp(P(y > mu)/tau), normalised, mu the policy that wrote the data. Never
        contradicted pairs stop at h = 1/(2 tau).

    Elsewhere:
        TRL 1.16 (loss_type ipo), HALOs and LLaMA-Factory divide each side's log-ratio by its
        length first, and TRL calls tau beta.
        OpenRLHF (ipo_enable) and Mitchell's repository: sums, as here and in the paper.
    """
    return (pairs.margin - 1 / (2 * tau)) ** 2


def psi_po(pairs: Pairs, *, tau: Positive, psi: Psi) -> PerPair:
    """PsiPO by regression of the margin on the soft preference p, both orders of a pair averaged.

    Azar et al. 2023 (arXiv:2310.12036), eq. 6; the regression is eq. 16 with Psi(p) for the label.

    Args:
        pairs: evidence; their preference is read.
        tau: weight of the pull to the reference.
        psi: the utility of a preference probability, odd about 1/2 (others are refused); the
            identity gives IPO, the logit RLHF's optimum.

    Optimum:
        pi_ref exp(E_{y' ~ mu} Psi(P(y > y'))/tau), normalised (eq. 7).

    Elsewhere:
        Nowhere. A hard label (p = 1) stands for its probability only if Psi is affine.
    """
    target = (psi(pairs.preference) - psi(1 - pairs.preference)) / (2 * tau)
    return (pairs.margin - target) ** 2


def hinge(pairs: Pairs, *, beta: Positive) -> PerPair:
    """The hinge on log-ratios.

    Liu et al. 2023 (arXiv:2309.06657), the hinge of RSO; SLiC's own is `slic`.

    Optimum:
        Any policy whose margins are all at least 1/beta.

    Elsewhere:
        TRL 1.16: loss_type hinge.
        torchtune: RSOLoss with gamma for beta.
    """
    return F.relu(1 - beta * pairs.margin)


def f_dpo(pairs: Pairs, *, beta: Positive, divergence: DPOInducing) -> PerPair:
    """DPO with D_f in the place of the reverse KL; SquaredPO with f = squared_log.

    Wang et al. 2023 (arXiv:2309.16240); f need not be convex, only f'(0+) = -inf: Pipano et al.
    2026 (arXiv:2602.06788), corollary 1.

    Args:
        pairs: evidence.
        beta: weight of the divergence.
        divergence: a DPO-inducing f: a name of the table, {alpha: a}, {squared_log: c} or a
            formula in t. Its score is f'(e^u) - f'(1).

    Optimum:
        The policy with r - beta f'(pi/pi_ref) the same for all completions, r the Bradley-Terry
        reward. Where the score is not injective it need not be the only stationary policy.

    Elsewhere:
        TRL 1.16: loss_type sigmoid with f_divergence_type reverse_kl, forward_kl, js_divergence, or
        alpha_divergence, whose coefficient is 1 - alpha; its rewards/* stay beta u.
        Wang's repository: alpha as here, forward KL and alpha without their constants.
        SquaredPO, chi-squared mixtures and formulas: nowhere.
    """
    chosen = divergence.score(pairs.chosen.logratio)
    rejected = divergence.score(pairs.rejected.logratio)
    return -F.logsigmoid(beta * (chosen - rejected))


def exo_pref(pairs: Pairs, *, beta: Positive, label_smoothing: OpenSmoothing) -> PerPair:
    """KL(q || p) of q = (sigmoid(beta h), sigmoid(-beta h)) to p = (1 - eps, eps).

    Ji et al. 2024 (arXiv:2402.00856), eq. 16, with eps the label smoothing: the reverse KL where
    cDPO has the forward one. At eps = 0 it would be infinite.

    Optimum:
        beta h = log((1 - eps)/eps), cDPO's, reached from the other side of the divergence.

    Elsewhere:
        TRL 1.16: loss_type exo_pair, eps = label_smoothing, the same.
        EXO's repository: exo-pref has the log-targets (0, -10), not normalised: eps = 4.54e-5 and
        a loss lower by that; its label_smooth is never read.
    """
    logits = beta * pairs.margin
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def chi_po(pairs: Pairs, *, beta: Positive, max_reward: Positive) -> PerPair:
    """F-DPO with half of Pearson's chi-squared plus the KL, its logits clipped.

    Huang et al. 2024 (arXiv:2407.13399): the link phi(t) = t + log t.

    Args:
        pairs: evidence.
        beta: weight of the divergence.
        max_reward: R_max, a bound on rewards; logits are clipped to +-2 R_max, beyond which a pair
            has no gradient.

    Optimum:
        That of f_dpo with mixed_chi_squared, while no logit is clipped.

    Elsewhere:
        Nowhere among the trainers; without the clip it is f_dpo with mixed_chi_squared.
    """
    score = DIVERGENCES["mixed_chi_squared"].score
    logits = beta * (score(pairs.chosen.logratio) - score(pairs.rejected.logratio))
    return -F.logsigmoid(logits.clamp(-2 * max_reward, 2 * max_reward))


def sppo(pairs: Pairs, *, beta: Positive) -> PerPair:
    """Self-play preference optimisation with hard labels: both log-ratios are regressed.

    Wu et al. 2024 (arXiv:2405.00675), with eta = 1/beta; the reference is the previous iterate.

    Optimum:
        Of pairs never contradicted: u_w = 1/(2 beta) and u_l = -1/(2 beta).

    Elsewhere:
        TRL 1.16: loss_type sppo_hard, the same sum of the two squares.
        SPPO's repository: their mean, half of this.
    """
    target = 1 / (2 * beta)
    return (pairs.chosen.logratio - target) ** 2 + (pairs.rejected.logratio + target) ** 2


def dpop(pairs: Pairs, *, beta: Positive, penalty: NonNegative) -> PerPair:
    """DPO-positive: a chosen completion that falls below its reference costs extra.

    Pal et al. 2024 (arXiv:2402.13228), Smaug.

    Args:
        pairs: evidence.
        beta: weight of the pull to the reference.
        penalty: lambda, in margins lost for each nat that the chosen fell.

    Optimum:
        DPO's, where no chosen completion falls below its reference.

    Elsewhere:
        LLaMA-Factory and TRL 1.16: none.
    """
    fallen = F.relu(-pairs.chosen.logratio)
    return -F.logsigmoid(beta * (pairs.margin - penalty * fallen))


def apo_zero(pairs: Pairs, *, beta: Positive) -> PerPair:
    """Anchored preference optimisation for data better than the policy: chosen up, rejected down.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    Optimum:
        None: u_w grows and u_l falls, with a gradient that vanishes.

    Elsewhere:
        TRL 1.16: loss_type apo_zero; KTOTrainer's apo_zero_unpaired is half of it on pairs.
    """
    chosen, rejected = beta * pairs.chosen.logratio, beta * pairs.rejected.logratio
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(pairs: Pairs, *, beta: Positive) -> PerPair:
    """Anchored preference optimisation for data worse than the policy: both down, rejected more.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    Optimum:
        None: both log-ratios fall, with a gradient that vanishes.

    Elsewhere:
        TRL 1.16: loss_type apo_down.
    """
    return (beta * pairs.chosen.logratio).sigmoid() + 1 - (beta * pairs.margin).sigmoid()


def nca_pair(pairs: Pairs, *, beta: Positive) -> PerPair:
    """Noise-contrastive alignment of a pair: absolute log-ratios are learnt, not their difference.

    Chen et al. 2024 (arXiv:2402.05369).

    Optimum:
        Of pairs never contradicted: sigmoid(beta u_w) = 2/3, and u_l falls for ever.

    Elsewhere:
        TRL 1.16: loss_type nca_pair.
        NCA's repository: the list form, `nca` here, with rewards (1, 0) and alpha towards 0.
    """
    chosen, rejected = beta * pairs.chosen.logratio, beta * pairs.rejected.logratio
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair(pairs: Pairs, *, beta: Positive) -> PerPair:
    """Binary classifier optimisation of a pair, without its running shift of rewards.

    Jung et al. 2024 (arXiv:2404.04656), with delta = 0.

    Optimum:
        None of pairs never contradicted: u_w grows and u_l falls for ever.

    Elsewhere:
        TRL 1.16: loss_type bco_pair, delta = 0 too.
        LLaMA-Factory: pref_bco_weight, with the running mean delta.
    """
    chosen, rejected = beta * pairs.chosen.logratio, beta * pairs.rejected.logratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def cal_dpo(pairs: Pairs, *, beta: Positive, calibration: Positive) -> PerPair:
    """Calibrated DPO: log-ratios are also regressed to the scale of rewards.

    Xiao et al. 2024 (arXiv:2412.14516); there is no beta inside the sigmoid.

    Args:
        pairs: evidence.
        beta: sets the targets +-1/(2 beta).
        calibration: weight of the regression.

    Optimum:
        Of pairs never contradicted: u_w a little above 1/(2 beta), u_l as much below its negative.

    Elsewhere:
        Cal-DPO's repository: calibration = 1/2; the paper's value could not be confirmed.
    """
    target = 1 / (2 * beta)
    squares = (pairs.chosen.logratio - target) ** 2 + (pairs.rejected.logratio + target) ** 2
    return -F.logsigmoid(pairs.margin) + calibration * squares


def dpo_norm(pairs: Pairs, *, beta: Positive) -> PerPair:
    """DPO on log-ratios per token, so that length alone gives no margin.

    Length-normalised DPO as in Lambert et al. 2024 (arXiv:2411.15124), Tulu 3.

    Optimum:
        As DPO's in the log-ratio per token.

    Elsewhere:
        TRL 1.16: loss_type sigmoid_norm.
        open-instruct: dpo_norm, its default, with beta = 5.
    """
    return -F.logsigmoid(beta * (pairs.chosen.mean_logratio - pairs.rejected.mean_logratio))


def r_dpo(pairs: Pairs, *, beta: Positive, alpha: Positive) -> PerPair:
    """DPO with a price on length: a chosen completion that is longer has to lead by less.

    Park et al. 2024 (arXiv:2403.19159).

    Args:
        pairs: evidence.
        beta: weight of the pull to the reference.
        alpha: price of a token, in units of the reward.

    Optimum:
        pi_ref exp((r - alpha |y|)/beta), normalised, r the Bradley-Terry reward.

    Elsewhere:
        TRL 1.16: none. What is called RPO there and elsewhere is another method.
    """
    longer = (pairs.chosen.tokens - pairs.rejected.tokens).to(pairs.margin.dtype)
    return -F.logsigmoid(beta * pairs.margin + alpha * longer)


def ld_dpo(pairs: SharedPairs, *, beta: Positive, alpha: Share) -> PerPair:
    """Length-desensitised DPO: tokens beyond the shorter side's length count alpha.

    Liu et al. 2024 (arXiv:2409.06411).

    Args:
        pairs: evidence, whole and cut to the shared length.
        beta: weight of the pull to the reference.
        alpha: worth of a token beyond the shared length; 1 gives DPO.

    Optimum:
        As DPO's in the desensitised log-ratio.

    Elsewhere:
        TRL 1.16: ld_alpha, on policy and reference alike, as here.
        LLaMA-Factory: ld_alpha on the policy alone, so step 0 is not log 2.
    """
    return -F.logsigmoid(beta * (alpha * pairs.whole.margin + (1 - alpha) * pairs.shared.margin))


def wpo(pairs: WeightedPairs, *, beta: Positive) -> PerPair:
    """DPO weighted by how likely the policy is to write the pair: off-policy pairs count less.

    Zhou et al. 2024 (arXiv:2406.11827); a completion's weight is the exponential of the mean over
    its tokens of log pi(y_t) - log sum_v pi(v)^2, a pair's their product, at most 1.

    Args:
        pairs: evidence and its weights, which carry no gradient.
        beta: weight of the pull to the reference.

    Optimum:
        DPO's, of the reweighted pairs.

    Elsewhere:
        TRL 1.16: use_weighting, with any loss; its product is not cut at 1.
        WPO's repository: cut, as here.
    """
    return -pairs.weight.detach() * F.logsigmoid(beta * pairs.pairs.margin)


def tdpo1(pairs: SequentialPairs, *, beta: Positive) -> PerPair:
    """Token-level DPO, its first form: the margin less the difference of sequential KLs.

    Zeng et al. 2024 (arXiv:2404.11999); the KL is KL(pi_ref || pi_theta) over the vocabulary.

    Args:
        pairs: evidence with both sides' sequential KL, which carries the gradient.
        beta: weight of the pull to the reference.

    Optimum:
        Of the token-level Bradley-Terry model; none in closed form over completions.

    Elsewhere:
        TDPO's repository: tdpo1. TRL: none.
    """
    return -F.logsigmoid(beta * (pairs.pairs.margin - (pairs.rejected_kl - pairs.chosen_kl)))


def tdpo2(pairs: SequentialPairs, *, beta: Positive, alpha: Positive) -> PerPair:
    """Token-level DPO, its second form: the chosen side's KL carries no gradient.

    Zeng et al. 2024 (arXiv:2404.11999).

    Args:
        pairs: evidence with both sides' sequential KL.
        beta: weight of the pull to the reference.
        alpha: weight of the KL difference.

    Optimum:
        Of the token-level Bradley-Terry model; none in closed form over completions.

    Elsewhere:
        TDPO's repository: tdpo2, alpha = 0.5 by default. TRL: none.
    """
    difference = pairs.rejected_kl - pairs.chosen_kl.detach()
    return -F.logsigmoid(beta * (pairs.pairs.margin - alpha * difference))
