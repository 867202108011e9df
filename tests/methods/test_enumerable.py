"""A language model of 81 texts, whose divergences to a target are sums and no estimates.

Three tokens, four places, one row of logits for every prefix: well specified for any target.
"""

import functools
import itertools
import statistics
from dataclasses import dataclass

import pytest
import torch
from tabular import double, gradient, kl
from torch import Tensor

from prefopt.batches import Rollouts, Samples, Scored
from prefopt.divergences import DIVERGENCES, Divergence, alpha, divergence
from prefopt.losses.distributional import f_dpg, leave_one_out, pseudo_rewards
from prefopt.losses.reinforcement import ppo, rloo

TEXTS = list(itertools.product(range(3), repeat=4))
PREFIXES = [prefix for length in range(4) for prefix in itertools.product(range(3), repeat=length)]
TOKENS = torch.tensor(TEXTS)
ROWS = torch.tensor([[PREFIXES.index(text[:i]) for i in range(4)] for text in TEXTS])
# Token 2 is rare.
LOGITS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOGITS -= double([0, 0, 2])

# Whether token 2 occurs, and whether the count of token 1 is even.
FEATURES = double([[2 in text, text.count(1) % 2 == 0] for text in TEXTS])
REWARDS = TOKENS.eq(2).sum(-1).double()
BETA = 0.25


def logps(logits: Tensor) -> Tensor:
    """Of all texts."""
    return logits.log_softmax(-1)[ROWS, TOKENS].sum(-1)


BASE = logps(LOGITS)
TILTED = (BASE + REWARDS / BETA).log_softmax(0)
# The exponential family's member with lambdas (1.2, 1.5), whose moments are near .4 and .9.
FAMILY = (BASE + FEATURES @ double([1.2, 1.5])).log_softmax(0)


def entropy(logp: Tensor) -> float:
    return -(logp.exp() * logp).sum().item()


@pytest.mark.parametrize("d", [*DIVERGENCES.values(), alpha(0.3)], ids=repr)
def test_exact_gradients_reach_the_target_for_every_f(d: Divergence) -> None:
    logits = LOGITS.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    target = FAMILY.exp()
    for _ in range(2000):
        logp = logps(logits)
        policy = logp.detach().exp()
        baseline = -d.slope_at_one
        samples = Samples(logp, logp.detach(), FAMILY, torch.full_like(policy, baseline))
        optimiser.zero_grad()
        (policy * f_dpg(samples, divergence=d)).sum().backward()
        optimiser.step()
        # The total variation's slope does not shrink towards the target, so its rate must.
        optimiser.param_groups[0]["lr"] *= 0.993
    logp = logps(logits.detach())
    assert (target * d.f(logp - FAMILY)).sum().abs().item() < 1e-6


@dataclass(frozen=True)
class Course:
    """Of a sampled training: the policies' log-probabilities, step by step."""

    logps: list[Tensor]

    @property
    def entropies(self) -> list[float]:
        return [entropy(logp) for logp in self.logps]

    def kls_from(self, target: Tensor) -> list[float]:
        return [kl(target.exp(), logp.exp()).item() for logp in self.logps]


@functools.cache
def trained(name: str, target_name: str, seed: int, *, num_samples: int, rate: float) -> Course:
    """By f-DPG on its own samples, against the mean of the step's others."""
    target = {"tilted": TILTED, "family": FAMILY}[target_name]
    d = divergence(name)
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=rate)
    found: list[Tensor] = []
    num_steps = 200
    for step in range(num_steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / num_steps)
        logp = logps(logits)
        found.append(logp.detach())
        drawn = torch.multinomial(logp.detach().exp(), num_samples, True, generator=generator)
        mine = logp[drawn]
        rewards = pseudo_rewards(mine.detach() - target[drawn], d, -50.0)
        samples = Samples(mine, mine.detach(), target[drawn], leave_one_out(rewards[None])[0])
        optimiser.zero_grad()
        f_dpg(samples, divergence=d).mean().backward()
        optimiser.step()
    return Course([*found, logps(logits.detach())])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "total_variation"])
def test_sampled_training_reaches_the_moments(name: str) -> None:
    last = trained(name, "family", 0, num_samples=64, rate=0.05).logps[-1]
    wanted = FAMILY.exp() @ FEATURES
    assert (last.exp() @ FEATURES - wanted).abs().max() < 0.02
    assert (BASE.exp() @ FEATURES - wanted).abs().min() > 0.2


tilted = functools.partial(trained, target_name="tilted", num_samples=32, rate=0.1)


def test_the_reverse_kls_entropy_dips_below_the_targets_and_recovers() -> None:
    entropies = [tilted("reverse_kl", seed=seed).entropies for seed in range(3)]
    lowest = statistics.mean(map(min, entropies))
    last = statistics.mean(course[-1] for course in entropies)
    assert lowest < 0.9 * entropy(TILTED)
    assert lowest < last < entropy(BASE)
    assert last > lowest + 0.03


def test_the_forward_kl_is_the_noisiest_aligns_least_and_loses_on_its_own_objective() -> None:
    """The papers' finding on targets far from the reference; the mean over steps and seeds."""
    spread, aligned, objective = {}, {}, {}
    for name in ("reverse_kl", "forward_kl", "jensen_shannon", "total_variation"):
        courses = [tilted(name, seed=seed) for seed in range(3)]
        kls = [course.kls_from(TILTED) for course in courses]
        spread[name] = statistics.mean(map(statistics.stdev, zip(*kls, strict=True)))
        early = [(course.logps[30].exp() @ FEATURES)[0].item() for course in courses]
        aligned[name] = statistics.mean(early)
        objective[name] = statistics.mean(course[-1] for course in kls)
    assert max(spread, key=spread.__getitem__) == "forward_kl"
    assert max(aligned, key=aligned.__getitem__) == "reverse_kl"
    assert max(objective, key=objective.__getitem__) == "forward_kl"
    assert min(objective, key=objective.__getitem__) == "jensen_shannon"


def of_logps(logp: Tensor, proposal: Tensor, drawn: Tensor) -> tuple[Samples, Rollouts]:
    """The same draws as evidence of both kinds, each against the mean of the others."""
    reference, reward, target = BASE[drawn], REWARDS[drawn], TILTED[drawn]
    of_q = pseudo_rewards(proposal - target, DIVERGENCES["reverse_kl"], -1e3)
    of_r = reward - BETA * (proposal - reference)
    tokens = torch.full_like(drawn, 4)
    return (
        Samples(logp, proposal, target, leave_one_out(of_q[None])[0]),
        Rollouts(Scored(logp, reference, tokens), proposal, reward, leave_one_out(of_r[None])[0]),
    )


def test_the_reverse_kl_on_the_tilted_target_is_kl_regularised_reinforce_sample_by_sample() -> None:
    """Whatever log Z is, and for any proposal: leave-one-out drops it."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(BASE.exp(), 16, True, generator=generator)
    policy = BASE[drawn] + 0.3 * torch.randn(16, generator=generator, dtype=torch.float64)
    for proposal in (policy, BASE[drawn]):

        def by_f_dpg(logp: Tensor, q: Tensor = proposal) -> Tensor:
            samples, _ = of_logps(logp, q, drawn)
            return BETA * f_dpg(samples, divergence=DIVERGENCES["reverse_kl"], floor=-1e3)

        def by_rloo(logp: Tensor, q: Tensor = proposal) -> Tensor:
            return rloo(of_logps(logp, q, drawn)[1], beta=BETA)

        (expected,), (found,) = gradient(by_rloo, policy), gradient(by_f_dpg, policy)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_rloos_expected_gradient_is_that_of_the_regularised_reward() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = LOGITS + torch.randn(40, 3, generator=generator, dtype=torch.float64)
    policy = logps(logits)

    def surrogate(at: Tensor) -> Tensor:
        scored = Scored(logps(at), BASE, torch.full((81,), 4))
        rollouts = Rollouts(scored, policy, REWARDS, torch.full_like(policy, 0.7))
        return (policy.exp() * rloo(rollouts, beta=BETA)).sum()

    def regularised(at: Tensor) -> Tensor:
        p = logps(at).exp()
        return BETA * kl(p, BASE.exp()) - (p * REWARDS).sum()

    (found,), (expected,) = gradient(surrogate, logits), gradient(regularised, logits)
    assert torch.allclose(found, expected, atol=1e-12)


def test_ppo_is_rloo_at_the_proposal_and_stops_at_the_clip() -> None:
    proposal = BASE[:2]

    def rollouts(logp: Tensor) -> Rollouts:
        scored = Scored(logp, proposal, torch.full((2,), 4))
        return Rollouts(scored, proposal, double([1.0, -1.0]), double([0.0, 0.0]))

    def slopes(logp: Tensor) -> list[float]:
        (found,) = gradient(lambda x: ppo(rollouts(x), beta=BETA, clip=0.2), logp)
        return found.tolist()

    (expected,) = gradient(lambda x: rloo(rollouts(x), beta=BETA), proposal)
    assert slopes(proposal) == pytest.approx(expected.tolist(), abs=1e-15)
    # Beyond the clip there is nothing more to gain, and what was lost can be won back.
    assert slopes(proposal + double([0.3, -0.3])) == [0.0, 0.0]
    assert slopes(proposal + double([-0.3, 0.3])) == pytest.approx(
        [-torch.tensor(-0.3).exp().item(), torch.tensor(0.3).exp().item()], rel=1e-6
    )


def test_at_the_tilted_target_no_completion_is_worth_more_than_another() -> None:
    _, rollouts = of_logps(TILTED, TILTED, torch.arange(81))
    worth = rollouts.rewards - BETA * rollouts.completions.logratio
    assert worth.std().item() < 1e-12
