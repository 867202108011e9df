"""Laws that every loss must keep, proven on this machine: `proofs(loss)` yields one verdict a law.

Each loss is taken with hyperparameters from its own signature, with every divergence and Psi that
it admits, and held against its row of the table: its printed formula, that formula's gradient, its
value at the reference, and the invariances that it declares.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefopt import batches, domains
from prefopt.batches import Scored
from prefopt.divergences import DIVERGENCES, Divergence, alpha, shifted_squared_log
from prefopt.losses import Loss
from prefopt.losses.formulas import gradients, hyperparameters_of, value
from prefopt.psi import Psi, psi

BATCH = 8
K = 4
EXACT = 1e-9  # relative, in float64

TYPICAL: dict[Any, float] = {
    domains.Positive: 0.1,
    domains.NonNegative: 0.5,
    domains.Negative: -50.0,
    domains.Smoothing: 0.1,
    domains.OpenSmoothing: 0.1,
    domains.Fraction: 0.3,
    domains.Share: 0.3,
}
# What carries the policy's gradient and gets none of the loss.
UNREACHED = {"tdpo2": ".chosen_kl", "preferred_ft": ".rejected.logp"}
ALL_DIVERGENCES = [*DIVERGENCES.values(), alpha(0.3), shifted_squared_log(0.5)]


@dataclass(frozen=True)
class Case:
    """A loss with hyperparameters.

    Args:
        loss: its row.
        hyperparameters: all of them, bound.
        variant: the divergence or Psi, if it takes one.
    """

    loss: Loss
    hyperparameters: dict[str, Any]
    variant: str = ""

    def __call__(self, batch: Any) -> Tensor:
        return self.loss.function(batch, **self.hyperparameters)

    def __str__(self) -> str:
        return f"{self.loss.name}({self.variant})" if self.variant else self.loss.name


@dataclass(frozen=True)
class Proof:
    """How far a law was from holding.

    Args:
        case: the loss.
        law: the law's name.
        error: the worst deviation, or the count of violations.
        tolerance: up to which the law holds.
    """

    case: str
    law: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def cases(loss: Loss) -> list[Case]:
    """The loss with typical hyperparameters, once for every divergence or Psi that it admits."""
    plain: dict[str, Any] = {}
    variants: list[dict[str, Any]] = [{}]
    for name, parameter in hyperparameters_of(loss).items():
        if parameter.annotation is domains.DPOInducing:
            variants = [{name: d} for d in ALL_DIVERGENCES if d.dpo_inducing]
        elif parameter.annotation is Divergence:
            variants = [{name: d} for d in ALL_DIVERGENCES]
        elif parameter.annotation is Psi:
            variants = [{name: psi("identity")}, {name: psi({"logit": 0.01})}]
        else:
            plain[name] = TYPICAL[parameter.annotation]
    return [
        Case(loss, plain | variant, ", ".join(map(str, variant.values()))) for variant in variants
    ]


def proofs(loss: Loss) -> Iterator[Proof]:
    """Every law of the loss that applies to it."""
    for case in cases(loss):
        for law in LAWS:
            found = law(case)
            if found is not None:
                error, tolerance = found
                yield Proof(str(case), law.__name__.replace("_", " "), error, tolerance)


# Evidence


def batch_of(
    evidence: str,
    *,
    logratios: Callable[..., Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Any:
    """Random evidence; `logratios(shape)` replaces its log-ratios, drawn from N(0, 1) otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(dtype)

    def scored(*shape: int) -> Scored:
        tokens = torch.randint(5, 20, shape, generator=generator)
        reference = -2 * tokens - normal(*shape).abs()
        u = normal(*shape) if logratios is None else logratios(shape)
        # Two roundings, so that in a low precision u is still what was asked for.
        return Scored((reference + u).to(dtype), reference.to(dtype), tokens)

    def pairs() -> batches.Pairs:
        return batches.Pairs(scored(BATCH), scored(BATCH), uniform(0.55, 0.95, BATCH))

    match evidence:
        case "Pairs":
            return pairs()
        case "SharedPairs":
            return batches.SharedPairs(pairs(), pairs())
        case "WeightedPairs":
            return batches.WeightedPairs(pairs(), uniform(0.1, 1.0, BATCH))
        case "SequentialPairs":
            found = pairs()
            # No KL where the policy is the reference, and one that grows with the log-ratio else.
            kls = (0.1 * side.logratio.abs() for side in (found.chosen, found.rejected))
            return batches.SequentialPairs(found, *kls)
        case "Rankings":
            return batches.Rankings(scored(BATCH, K), uniform(-0.2, 0.2, BATCH, K))
        case "Labelled":
            desirable = torch.arange(BATCH) % 2 == 0
            return batches.Labelled(scored(BATCH), desirable, scored(BATCH))
        case "Revisions":
            return batches.Revisions(*(scored(BATCH) for _ in range(6)))
        case "Samples":
            found, other = scored(BATCH), scored(BATCH)
            target = found.reference_logp + (0 if logratios else 0.3)
            proposal = found.reference_logp + 0.1 * (other.logp - other.reference_logp)
            return batches.Samples(
                found.logp, proposal, target, torch.full((BATCH,), 0.2).to(dtype)
            )
        case "Rollouts":
            found, other = scored(BATCH), scored(BATCH)
            proposal = found.reference_logp + 0.1 * (other.logp - other.reference_logp)
            baseline = torch.zeros(BATCH, dtype=dtype)
            return batches.Rollouts(found, proposal, uniform(-0.2, 0.2, BATCH), baseline)
        case _:
            raise ValueError(f"no such evidence, got '{evidence}'; known: see prefopt.batches")


def mapped(batch: Any, function: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """The batch with every tensor replaced by `function(its dotted name, it)`."""
    if not is_dataclass(batch):
        return function(name, batch)
    parts = {
        f.name: mapped(getattr(batch, f.name), function, f"{name}.{f.name}") for f in fields(batch)
    }
    return type(batch)(**parts)


def carries(name: str) -> bool:
    """Whether a tensor of a batch carries the policy's gradient."""
    return name.endswith((".logp", "_kl")) and ".mismatched" not in name


def tracked(batch: Any) -> tuple[Any, dict[str, Tensor]]:
    """The batch with leaves for its policy's log-probabilities, and those leaves by name."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if carries(name):
            leaves[name] = tensor = tensor.detach().clone().requires_grad_()
        return tensor

    return mapped(batch, leaf), leaves


def gradient(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to values above 1."""
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


# The laws: (error, tolerance), or None where one does not apply.

Verdict = tuple[float, float] | None


def value_is_the_formula(case: Case) -> Verdict:
    worst = 0.0
    for seed in range(3):
        batch = batch_of(case.loss.evidence, seed=seed)
        written = value(case.loss, case.loss.formula, batch.symbols(), case.hyperparameters)
        worst = max(worst, distance(case(batch), written))
    return worst, EXACT


def gradient_is_the_formulas(case: Case) -> Verdict:
    batch, leaves = tracked(batch_of(case.loss.evidence))
    written = value(case.loss, case.loss.formula, batch.symbols(), case.hyperparameters)
    found, expected = gradient(case(batch), leaves), gradient(written, leaves)
    return max(distance(found[name], expected[name]) for name in leaves), EXACT


def printed_gradient_is_autograds(case: Case) -> Verdict:
    derivatives = gradients(case.loss)
    if not derivatives:
        return None
    symbols = {
        name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in batch_of(case.loss.evidence).symbols().items()
    }
    if "u_w" in derivatives:
        symbols["h"] = symbols["u_w"] - symbols["u_l"]
    leaves = {name: symbols[name] for name in derivatives}
    expected = gradient(value(case.loss, case.loss.formula, symbols, case.hyperparameters), leaves)
    found = {
        name: value(case.loss, derivative, symbols, case.hyperparameters)
        for name, derivative in derivatives.items()
    }
    return max(distance(found[name], expected[name]) for name in leaves), EXACT


def value_at_the_reference_is_declared(case: Case) -> Verdict:
    if not case.loss.at_reference:
        return None
    batch = batch_of(case.loss.evidence, logratios=torch.zeros)
    declared = value(case.loss, case.loss.at_reference, batch.symbols(), case.hyperparameters)
    return distance(case(batch), declared), EXACT


def descent_raises_what_is_preferred(case: Case) -> Verdict:
    """Counts the examples in which a small step against the gradient does not."""
    near = torch.Generator().manual_seed(1)
    batch, leaves = tracked(
        batch_of(
            case.loss.evidence,
            logratios=lambda shape: 0.1 * torch.randn(shape, generator=near, dtype=torch.float64),
        )
    )
    if isinstance(batch, batches.Samples):
        # Against f'(1): the policy's probability rises where it lies below the target's.
        batch = replace(
            batch,
            baseline=torch.full_like(batch.logp, -case.hyperparameters["divergence"].slope_at_one),
        )
    down = gradient(case(batch), leaves)
    match batch:
        case batches.Rankings(rewards=rewards):
            wish = rewards - rewards.mean(-1, keepdim=True)
            rise = -(wish * down[".completions.logp"]).sum(-1)
        case batches.Labelled(desirable=desirable):
            rise = -down[".completions.logp"] * torch.where(desirable, 1.0, -1.0)
        case batches.Rollouts():
            beta = case.hyperparameters["beta"]
            worth = batch.rewards - beta * batch.completions.logratio
            rise = -down[".completions.logp"] * worth.sign()
        case batches.Samples():
            rise = down[".logp"] * (batch.logp - batch.target_logp).sign()
        case _:
            (chosen,) = (
                down[n] for n in leaves if n.endswith(".chosen.logp") and ".shared" not in n
            )
            (rejected,) = (
                down[n] for n in leaves if n.endswith(".rejected.logp") and ".shared" not in n
            )
            rise = rejected - chosen
    return float((rise <= 0).sum()), 0.0


def value_and_gradient_are_finite(case: Case) -> Verdict:
    """Counts non-finite numbers at log-ratios of -300, 0 and 300, in float32 and bfloat16."""
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)

            def far(shape: tuple[int, ...], generator: torch.Generator = generator) -> Tensor:
                drawn = torch.randint(-1, 2, shape, generator=generator)
                return 300.0 * drawn.double()

            batch = batch_of(case.loss.evidence, logratios=far, dtype=dtype, seed=seed)
            # Log-probabilities are never positive.
            batch, leaves = tracked(
                mapped(batch, lambda n, x: x - 400 if n.endswith("logp") else x)
            )
            loss = case(batch)
            bad += int((~loss.isfinite()).sum())
            bad += sum(int((~g.isfinite()).sum()) for g in gradient(loss, leaves).values())
    return float(bad), 0.0


def gradient_reaches_the_policy_alone(case: Case) -> Verdict:
    """Counts tensors that get a gradient and should not, or should and do not."""
    leaves: dict[str, Tensor] = {}
    data = (".reference_logp", ".tokens", ".preference", ".rewards", ".desirable")

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith(data):
            leaves[name] = tensor = tensor.detach().clone().requires_grad_()
        return tensor

    batch = mapped(batch_of(case.loss.evidence), leaf)
    reached = {name: bool(g.abs().sum() > 0) for name, g in gradient(case(batch), leaves).items()}
    if case.loss.name in UNREACHED:
        reached[UNREACHED[case.loss.name]] ^= True
    return float(sum(reached[name] != carries(name) for name in reached)), 0.0


def splitting_a_micro_batch_changes_nothing(case: Case) -> Verdict:
    """Where a loss declares that it couples examples, the split must show that it does."""
    batch = batch_of(
        case.loss.evidence, logratios=lambda shape: 1 + torch.rand(shape, dtype=torch.float64)
    )
    halves = (
        mapped(batch, lambda _, x: x[: BATCH // 2]),
        mapped(batch, lambda _, x: x[BATCH // 2 :]),
    )
    error = distance(torch.cat([case(half) for half in halves]), case(batch))
    if case.loss.couples:
        return float(error <= EXACT), 0.0
    return error, EXACT


def a_constant_on_policy_and_reference_changes_nothing(case: Case) -> Verdict:
    """As gradients see it; a loss without a reference does not see the reference at all."""
    batch, leaves = tracked(batch_of(case.loss.evidence))

    def shift(name: str, tensor: Tensor) -> Tensor:
        if case.loss.reference or case.loss.evidence == "Samples":
            return tensor - 64 if name.endswith("logp") else tensor
        return 2 * tensor if name.endswith(".reference_logp") else tensor

    shifted, others = tracked(mapped(batch, shift))
    found, expected = gradient(case(shifted), others), gradient(case(batch), leaves)
    return max(distance(found[name], expected[name]) for name in leaves), EXACT


LAWS: tuple[Callable[[Case], Verdict], ...] = (
    value_is_the_formula,
    gradient_is_the_formulas,
    printed_gradient_is_autograds,
    value_at_the_reference_is_declared,
    descent_raises_what_is_preferred,
    value_and_gradient_are_finite,
    gradient_reaches_the_policy_alone,
    splitting_a_micro_batch_changes_nothing,
    a_constant_on_policy_and_reference_changes_nothing,
)
