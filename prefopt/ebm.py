"""Targets p(y|x) = a(y|x) exp(s(x, y)) / Z, a the reference, known by samples of a.

The score s is r/beta for RLHF's tilt, lambda . phi for GDC's exponential family, and -inf where a
factor b excludes a completion. Samples that share a normaliser Z make a group: those of one prompt,
or all of them. Every group counts the same, and so does every sample within it. Weights normalise
themselves (self-normalised importance sampling with a as the proposal); all of it is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_STEPS = 100
TOLERANCE = 1e-6  # of a fitted moment, in the feature's own units
LEAST_ESS = 20.0  # effective samples that a target may rest on
LEAST_GROUP_ESS = 4.0  # of a typical group: its log Z is then off by about half a nat


@dataclass(frozen=True)
class Normalised:
    """A target, as weights on samples of the reference.

    Args:
        log_z: log Z of every group, nats; -inf where no sample of it is allowed.
        weights: of the samples, which sum to 1; groups that are allowed nothing have none.
        kl: KL(p || a) in nats a completion, the mean over groups.
        group_ess: effective samples of every group, Kish's; 0 where no sample of it is allowed.
    """

    log_z: Float[Tensor, " groups"]
    weights: Float[Tensor, " samples"]
    kl: float
    group_ess: Float[Tensor, " groups"]

    @property
    def ess(self) -> float:
        """Effective samples, Kish's: as many as equal weights would need to vary as little."""
        return 1 / self.weights.square().sum().item()

    @property
    def typical_group_ess(self) -> float:
        """The median over groups that are allowed anything."""
        return self.group_ess[self.group_ess > 0].median().item()

    def mean(self, features: Float[Tensor, "samples features"]) -> Float[Tensor, " features"]:
        """E_p[phi]."""
        return self.weights @ features.double()


@dataclass(frozen=True)
class Fit:
    """GDC's exponential family at its moments.

    Args:
        lambdas: one a feature.
        reached: its moments, by the samples.
        num_steps: of Newton's method.
        target: the family's member as weights.
    """

    lambdas: Float[Tensor, " features"]
    reached: Float[Tensor, " features"]
    num_steps: int
    target: Normalised


def normalised(scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]) -> Normalised:
    """The target of these scores.

    Args:
        scores: s of samples of the reference; -inf excludes.
        groups: a number from 0 on for each sample, of those that share its normaliser.

    Raises:
        ValueError: if no sample is allowed.
    """
    scores = scores.double()
    num_groups = int(groups.max()) + 1
    sizes = torch.bincount(groups, minlength=num_groups).double()
    largest = scores.new_full((num_groups,), -math.inf).scatter_reduce(0, groups, scores, "amax")
    alive = largest > -math.inf
    if not alive.any():
        raise ValueError(
            f"the target allows none of {len(scores)} samples of the reference, got probability 0 "
            "for each; take more samples (sample.num_completions), or a milder target"
        )
    shift = torch.where(alive, largest, 0.0)
    masses = (scores - shift[groups]).exp()
    totals = masses.new_zeros(num_groups).scatter_add(0, groups, masses)
    log_z = torch.where(alive, totals.log() - sizes.log() + shift, -math.inf)
    shares = masses / totals.clamp(min=1)[groups]
    weights = shares / alive.sum()
    within = torch.where(weights > 0, scores - log_z[groups], 0.0)
    squares = masses.new_zeros(num_groups).scatter_add(0, groups, shares.square())
    return Normalised(
        log_z,
        weights,
        kl=(weights * within).sum().item(),
        group_ess=torch.where(alive, 1 / squares, 0.0),
    )


def fitted(
    features: Float[Tensor, "samples features"],
    moments: Float[Tensor, " features"],
    groups: Int[Tensor, " samples"],
    *,
    allowed: Bool[Tensor, " samples"],
    names: Sequence[str],
) -> Fit:
    """The exponential family's member whose moments are these: the I-projection of the reference.

    Khalifa, Elsahar and Dymetman 2021 (arXiv:2012.11635), whose stochastic descent stops near it;
    here the convex dual, mean log Z - lambda . moments, is minimised by damped Newton steps.

    Args:
        features: phi of samples of the reference.
        moments: E_p[phi] wanted.
        groups: as in `normalised`; moments are means over groups.
        allowed: samples that factors do not exclude.
        names: of the features, as errors shall call them.

    Raises:
        ValueError: if a moment, or all of them together, cannot be reached on these samples.
    """
    features, moments = features.double(), moments.double()
    for number, name in enumerate(names):
        _check_reach(features[allowed, number], moments[number].item(), groups[allowed], name)

    def at(lambdas: Tensor) -> tuple[Normalised, float]:
        target = normalised(_excluding(features @ lambdas, allowed), groups)
        mean_log_z = target.log_z[target.log_z > -math.inf].mean()
        return target, (mean_log_z - lambdas @ moments).item()

    lambdas = torch.zeros_like(moments)
    target, dual = at(lambdas)
    for step in range(MAX_STEPS):
        slope = target.mean(features) - moments
        if slope.abs().max() <= TOLERANCE:
            return Fit(lambdas, target.mean(features), step, target)
        direction = torch.linalg.lstsq(_curvature(features, groups, target), slope).solution
        size = 1.0
        while size > 1e-8:
            tried, value = at(lambdas - size * direction)
            if value <= dual - 1e-4 * size * (slope @ direction).item():
                break
            size /= 2
        else:
            break
        lambdas, target, dual = lambdas - size * direction, tried, value
    reached = ", ".join(f"{x:.4g}" for x in target.mean(features).tolist())
    raise ValueError(
        f"{', '.join(names)}: moments that no tilt of the reference reaches together, got "
        f"{moments.tolist()} and came to {reached}; take moments that agree with each other, or "
        "more samples (sample.num_completions)"
    )


def check_ess(target: Normalised, where: str) -> None:
    """Refuse a target that rests on too few samples of the reference, in all or in most groups.

    Raises:
        ValueError: naming the remedy.
    """
    if target.ess < LEAST_ESS:
        raise ValueError(
            f"{where}: too far from the reference for its samples, got {target.ess:.3g} effective "
            f"ones of {len(target.weights)}, fewer than {LEAST_ESS:g}; take more samples "
            "(sample.num_prompts, sample.num_completions), or a milder target"
        )
    if target.typical_group_ess < LEAST_GROUP_ESS:
        size = len(target.weights) / len(target.log_z)
        raise ValueError(
            f"{where}: too far from the reference for its samples of one prompt, got a median of "
            f"{target.typical_group_ess:.3g} effective ones of {size:.3g}, fewer than "
            f"{LEAST_GROUP_ESS:g}, so that most prompts' log Z would be chance; take more samples "
            "a prompt (sample.num_completions), a milder target (a larger beta, moments nearer to "
            "the reference's), or one normaliser for all prompts (log_z: global)"
        )


def check_occurs(allowed: Bool[Tensor, " samples"], name: str) -> None:
    """Refuse a factor that excludes every sample of the reference.

    Raises:
        ValueError: naming the feature and the remedy.
    """
    if not allowed.any():
        raise ValueError(
            f"{name}: never occurs in {len(allowed)} samples of the reference, got a moment that "
            "none of them has; take more samples (sample.num_completions), another feature, or "
            "leave it out"
        )


def _excluding(scores: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, scores, -math.inf)


def _check_reach(values: Tensor, moment: float, groups: Tensor, name: str) -> None:
    """A tilt moves weight among samples of one group, and there between its extremes."""
    if values.numel() and values.min() == values.max():
        only = values[0].item()
        raise ValueError(
            f"{name}: "
            + ("never occurs" if only == 0 else "does not vary")
            + f" in {len(values)} samples of the reference, got {only:g} in each; its lambda would "
            "run away: take more samples (sample.num_completions), another feature, or leave it out"
        )
    num_groups = int(groups.max()) + 1
    ends = [
        values.new_full((num_groups,), sign * math.inf).scatter_reduce(0, groups, values, how)
        for sign, how in ((1, "amin"), (-1, "amax"))
    ]
    low, high = (end[end.isfinite()].mean().item() for end in ends)
    if not low < moment < high:
        raise ValueError(
            f"{name}: out of the reference's reach, got a moment of {moment:g} where its samples "
            f"allow more than {low:.4g} and less than {high:.4g} (their mean is "
            f"{values.mean().item():.4g}); take a moment in between, or more samples "
            "(sample.num_completions)"
        )


def _curvature(features: Tensor, groups: Tensor, target: Normalised) -> Tensor:
    """The mean over groups of the features' covariance under the target."""
    num_groups = len(target.log_z)
    weighted = target.weights[:, None] * features
    sums = features.new_zeros(num_groups, features.shape[1]).index_add(0, groups, weighted)
    share = target.weights.sum() / (target.log_z > -math.inf).sum()
    return features.T @ weighted - sums.T @ sums / share
