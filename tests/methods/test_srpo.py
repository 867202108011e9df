"""The checks of SRPO on bandits.

A policy of n actions is a vector of n + n^2 logits: the generator's, and the improver's by row, one
row a completion shown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from tabular import (
    BEHAVIOURS,
    INTRANSITIVE,
    REFERENCE_OF_THREE,
    best_policy,
    bradley_terry,
    double,
    minimise,
    normalised,
    over_pairs,
    revisions,
)
from torch import Tensor

from prefopt.domains import Fraction
from prefopt.losses import LOSSES
from prefopt.losses.formulas import hyperparameters_of
from prefopt.losses.pairwise import ipo
from prefopt.losses.self_improvement import srpo

PRINTED = 5e-7


@dataclass(frozen=True)
class Bandit:
    """Preferences P(row > column), both references (the improver's by row), and a beta."""

    preferences: Tensor
    reference: Tensor
    improver_reference: Tensor
    beta: float

    @property
    def actions(self) -> int:
        return len(self.reference)

    def logratios(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """R(y), and R+ with axes (shown, written)."""
        generator, improver = logits.split([self.actions, self.actions**2])
        improver = improver.view(self.actions, self.actions)
        return (
            generator.log_softmax(0) - self.reference.log(),
            improver.log_softmax(1) - self.improver_reference.log(),
        )

    def policies(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        generator, improver = self.logratios(logits)
        return self.reference * generator.exp(), self.improver_reference * improver.exp()

    def closed_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """Z, pi+* and pi* of 7.2."""
        weights = self.improver_reference * (self.preferences.T / self.beta).exp()
        z = weights.sum(1)
        return z, weights / z[:, None], normalised(self.reference / z)


def uniform(preferences: Tensor, beta: float) -> Bandit:
    n = len(preferences)
    return Bandit(
        preferences,
        torch.full((n,), 1 / n, dtype=torch.float64),
        torch.full((n, n), 1 / n, dtype=torch.float64),
        beta,
    )


THREE = Bandit(
    INTRANSITIVE,
    REFERENCE_OF_THREE,
    double([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]),
    beta=0.5,
)
# SR-7 and SR-8.
TRANSITIVE = uniform(bradley_terry(double([0.0, 1.0, 2.0])), beta=0.25)


def improver_loss(bandit: Bandit, logits: Tensor, behaviour: Tensor) -> Tensor:
    """L+ of 7.3, over pairs (y1, y2) of the behaviour policy."""
    _, improver = bandit.logratios(logits)
    wanted = bandit.preferences.T - 0.5  # axes (y1, y2), as R+'s
    found = bandit.beta * (improver - improver.diagonal()[:, None])
    return (behaviour[:, None] * behaviour * (wanted - found) ** 2).sum()


def generator_loss(bandit: Bandit, logits: Tensor, behaviour: Tensor) -> Tensor:
    """L_pi of 7.3."""
    generator, improver = bandit.logratios(logits)
    wanted = bandit.preferences.T - 0.5
    revised = improver - improver.T + generator[None, :] - generator[:, None]
    return (behaviour[:, None] * behaviour * (wanted - bandit.beta / 2 * revised) ** 2).sum()


def population_loss(bandit: Bandit, logits: Tensor, behaviour: Tensor, alpha: float) -> Tensor:
    of_generator = generator_loss(bandit, logits, behaviour)
    return (1 - alpha) * of_generator + alpha * improver_loss(bandit, logits, behaviour)


def labelled_loss(bandit: Bandit, logits: Tensor, behaviour: Tensor, alpha: float) -> Tensor:
    """The library's loss of pairs (i, j) of the behaviour policy, i chosen with P(i > j)."""
    generator, improver = bandit.logratios(logits)
    i, j = (k.flatten() for k in torch.meshgrid([torch.arange(bandit.actions)] * 2, indexing="ij"))

    def chosen_over(w: Tensor, r: Tensor) -> Tensor:
        evidence = revisions(
            generator[w],
            generator[r],
            improver[r, w],
            improver[r, r],
            improver[w, w],
            improver[w, r],
        )
        return srpo(evidence, beta=bandit.beta, alpha=alpha)

    p = bandit.preferences[i, j]
    losses = p * chosen_over(i, j) + (1 - p) * chosen_over(j, i)
    return (behaviour[i] * behaviour[j] * losses).sum()


Loss = Callable[[Bandit, Tensor, Tensor, float], Tensor]


def random_logits(bandit: Bandit, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = bandit.actions
    return torch.randn(n + n * n, generator=generator, dtype=torch.float64)


def trained(
    loss: Loss, bandit: Bandit, behaviour: Tensor, alpha: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The generator and the improver where descent from random logits ends."""
    start = random_logits(bandit, seed)
    return bandit.policies(minimise(lambda x: loss(bandit, x, behaviour, alpha), start))


def near(expected: Tensor, tolerance: float = 1e-6) -> object:
    return pytest.approx(expected.flatten().tolist(), abs=tolerance)


def test_sr_1_the_closed_forms_have_their_values() -> None:
    z, improver, generator = THREE.closed_form()
    assert z.tolist() == pytest.approx((2.939643, 3.115706, 2.751420), abs=PRINTED)
    assert improver.flatten().tolist() == pytest.approx(
        (
            *(0.369879, 0.124648, 0.505473),
            *(0.388332, 0.436222, 0.175445),
            *(0.162661, 0.442157, 0.395182),
        ),
        abs=PRINTED,
    )
    assert generator.tolist() == pytest.approx((0.501641, 0.283976, 0.214383), abs=PRINTED)
    saddle = -THREE.beta * (THREE.reference / z).sum().log().item()
    assert saddle == pytest.approx(0.540782, abs=PRINTED)
    # The objective of 7.1 at these two policies.
    won = (generator[:, None] * improver * THREE.preferences.T).sum()
    of_improver = (
        generator[:, None] * improver * (improver / THREE.improver_reference).log()
    ).sum()
    of_generator = (generator * (generator / THREE.reference).log()).sum()
    objective = won - THREE.beta * of_improver + THREE.beta * of_generator
    assert objective.item() == pytest.approx(saddle, abs=1e-14)


def test_sr_1_the_identities_hold_at_the_closed_forms() -> None:
    _, improver, generator = THREE.closed_form()
    plus = (improver / THREE.improver_reference).log()
    plain = (generator / THREE.reference).log()
    wanted = near(THREE.preferences.T, 1e-14)
    a = 0.5 + THREE.beta * (plus - plus.diagonal()[:, None])
    assert a.flatten().tolist() == wanted
    b = 0.5 + THREE.beta / 2 * (plus - plus.T + plain[None, :] - plain[:, None])
    assert b.flatten().tolist() == wanted
    c = plain[:, None] - plain[None, :]
    expected = plus.diagonal()[:, None] - plus.diagonal()[None, :]
    assert c.flatten().tolist() == near(expected, 1e-14)


@pytest.mark.parametrize(("beta", "printed"), [(0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459)])
def test_sr_2_of_two_actions_generator_and_improver_have_ipos_probability(
    beta: float, printed: float
) -> None:
    bandit = uniform(double([[0.5, 1.0], [0.0, 0.5]]), beta)
    expected = 1 / (1 + math.exp(-1 / (2 * beta)))
    assert expected == pytest.approx(printed, abs=PRINTED)
    half = double([0.5, 0.5])
    generator, improver = trained(labelled_loss, bandit, half, alpha=0.5)
    assert generator[0].item() == pytest.approx(expected, abs=1e-6)
    assert improver[1, 0].item() == pytest.approx(expected, abs=1e-6)
    of_ipo = best_policy(
        lambda u: over_pairs(partial(ipo, tau=beta), u, bandit.preferences / 4), half
    )
    assert of_ipo[0].item() == pytest.approx(expected, abs=1e-6)


every_behaviour = pytest.mark.parametrize("behaviour", BEHAVIOURS)


@every_behaviour
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", [population_loss, labelled_loss])
def test_sr_3_the_optimum_does_not_depend_on_the_behaviour_policy(
    loss: Loss, seed: int, behaviour: tuple[float, ...]
) -> None:
    _, improver, generator = THREE.closed_form()
    found = trained(loss, THREE, double(behaviour), alpha=0.5, seed=seed)
    assert found[0].tolist() == near(generator)
    assert found[1].flatten().tolist() == near(improver)


@every_behaviour
def test_sr_3_the_population_loss_is_zero_at_the_closed_forms(
    behaviour: tuple[float, ...],
) -> None:
    _, improver, generator = THREE.closed_form()
    logits = torch.cat([generator.log(), improver.log().flatten()])
    found = population_loss(THREE, logits, double(behaviour), 0.5)
    assert found.item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize(
    ("behaviour", "printed"),
    list(
        zip(
            BEHAVIOURS,
            [
                (0.528754, 0.259744, 0.211502),
                (0.517719, 0.167102, 0.315179),
                (0.406679, 0.386525, 0.206796),
            ],
            strict=True,
        )
    ),
)
def test_sr_3_ipos_optimum_does(behaviour: tuple[float, ...], printed: tuple[float, ...]) -> None:
    mu = double(behaviour)
    weights = mu[:, None] * mu * THREE.preferences
    found = best_policy(lambda u: over_pairs(partial(ipo, tau=0.5), u, weights), THREE.reference)
    assert found.tolist() == pytest.approx(printed, abs=1e-6)


@every_behaviour
def test_sr_3_labels_give_four_times_the_generators_loss_and_twice_the_improvers(
    behaviour: tuple[float, ...],
) -> None:
    mu = double(behaviour)
    offsets = []
    for seed in range(3):
        logits = random_logits(THREE, seed)
        of_generator = labelled_loss(THREE, logits, mu, 0.0) - 4 * generator_loss(THREE, logits, mu)
        of_improver = labelled_loss(THREE, logits, mu, 1.0) - 2 * improver_loss(THREE, logits, mu)
        # So that alpha here is alpha/(2 - alpha) there.
        alpha = 0.8
        together = labelled_loss(THREE, logits, mu, alpha) - (
            (4 * (1 - alpha) + 2 * alpha) * population_loss(THREE, logits, mu, alpha / (2 - alpha))
        )
        offsets.append([of_generator.item(), of_improver.item(), together.item()])
    for other in offsets[1:]:
        assert other == pytest.approx(offsets[0], abs=1e-12)


@pytest.mark.parametrize("loss", [population_loss, labelled_loss])
def test_sr_4_any_alpha_inside_has_the_same_optimum(loss: Loss) -> None:
    _, improver, generator = THREE.closed_form()
    for alpha in (0.2, 0.8):
        found = trained(loss, THREE, double(BEHAVIOURS[1]), alpha)
        assert found[0].tolist() == near(generator)
        assert found[1].flatten().tolist() == near(improver)


@pytest.mark.parametrize("loss", [population_loss, labelled_loss])
def test_sr_4_without_the_improvers_term_the_generator_is_wrong_and_depends_on_the_start(
    loss: Loss,
) -> None:
    mu = double(BEHAVIOURS[0])
    _, _, wanted = THREE.closed_form()
    first, second = (trained(loss, THREE, mu, 0.0, seed)[0] for seed in range(2))
    assert min((found - wanted).abs().max() for found in (first, second)) > 0.01
    assert (first - second).abs().max() > 0.01


def test_sr_4_without_the_improvers_term_the_generators_loss_is_zero_all_the_same() -> None:
    mu = double(BEHAVIOURS[0])
    found = minimise(lambda x: generator_loss(THREE, x, mu), random_logits(THREE, 0))
    assert generator_loss(THREE, found, mu).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("loss", [population_loss, labelled_loss])
def test_sr_4_without_the_generators_term_the_generator_stays_and_the_improver_is_right(
    loss: Loss,
) -> None:
    _, improver, _ = THREE.closed_form()
    before, _ = THREE.policies(random_logits(THREE, 0))
    found = trained(loss, THREE, double(BEHAVIOURS[0]), alpha=1.0, seed=0)
    assert found[0].tolist() == near(before, 1e-15)
    assert found[1].flatten().tolist() == near(improver)


def test_sr_4_both_ends_lie_outside_alphas_domain() -> None:
    assert hyperparameters_of(LOSSES["srpo"])["alpha"].annotation is Fraction


@pytest.mark.parametrize("p", [0.7, 0.5, 0.95])
def test_sr_5_one_pairs_labels_average_to_twice_p_less_one_and_to_p_less_a_half(p: float) -> None:
    beta = 0.3

    def generator(x: Tensor) -> Tensor:
        """First chosen with p; x is its log-ratio's lead, all terms of the generator together."""
        zero = torch.zeros(1, dtype=torch.float64)
        chosen = srpo(revisions(x, zero, zero, zero, zero, zero), beta=beta, alpha=0.0)
        rejected = srpo(revisions(zero, x, zero, zero, zero, zero), beta=beta, alpha=0.0)
        return (p * chosen + (1 - p) * rejected).sum()

    def improver(x: Tensor) -> Tensor:
        """The second is shown; x is R+(first|second) - R+(second|second)."""
        zero = torch.zeros(1, dtype=torch.float64)
        # Second rejected: w|l is x, l|l zero. Second chosen: w|w is zero, l|w is x.
        chosen = srpo(revisions(zero, zero, x, zero, zero, zero), beta=beta, alpha=1.0)
        rejected = srpo(revisions(zero, zero, zero, zero, zero, x), beta=beta, alpha=1.0)
        return (p * chosen + (1 - p) * rejected).sum()

    assert beta * minimise(generator, [0.3]).item() == pytest.approx(2 * p - 1, abs=1e-9)
    assert beta * minimise(improver, [0.3]).item() == pytest.approx(p - 0.5, abs=1e-9)


LOGPS = (-12.0, -15.0, -11.0, -13.0, -9.0, -14.0)
REFERENCE_LOGPS = (-12.5, -14.0, -11.4, -12.6, -9.3, -13.5)


def test_sr_6_the_unit_vector_has_its_log_ratios() -> None:
    found = [a - b for a, b in zip(LOGPS, REFERENCE_LOGPS, strict=True)]
    assert found == pytest.approx((0.5, -1, 0.4, -0.4, 0.3, -0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "alpha", "expected"),
    [
        (0.1, 1.0, 0.3528),
        (0.1, 0.0, 0.5776),
        (0.1, 0.8, 0.39776),
        (0.5, 1.0, 0.02),
        (0.5, 0.0, 0.04),
        (0.5, 0.5, 0.03),
    ],
)
def test_sr_6_the_unit_vector_has_its_losses(beta: float, alpha: float, expected: float) -> None:
    evidence = revisions(*(a - b for a, b in zip(LOGPS, REFERENCE_LOGPS, strict=True)))
    assert srpo(evidence, beta=beta, alpha=alpha).item() == pytest.approx(expected, abs=1e-12)
    generator = (beta * (0.4 + 0.5 + 0.5 + 1.0) - 1) ** 2
    improver = (0.5 - beta * 0.8) ** 2 + (0.5 - beta * 0.8) ** 2
    assert expected == pytest.approx((1 - alpha) * generator + alpha * improver, abs=1e-12)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.5), (0.0, 1.0), (0.8, 0.6)])
def test_sr_6_at_the_reference_only_alpha_counts(alpha: float, expected: float) -> None:
    evidence = revisions(*[0.0] * 6)
    assert srpo(evidence, beta=0.1, alpha=alpha).item() == pytest.approx(expected, abs=1e-12)


def improvements(bandit: Bandit) -> tuple[Tensor, Tensor]:
    """The chance to beat each shown completion, by the reference and by the optimal improver."""
    _, improver, _ = bandit.closed_form()
    beaten = bandit.preferences.T
    return (bandit.improver_reference * beaten).sum(1), (improver * beaten).sum(1)


def test_sr_7_the_improver_beats_what_it_is_shown_more_often_than_the_reference() -> None:
    before, after = improvements(TRANSITIVE)
    assert before.tolist() == pytest.approx((0.7040, 0.5, 0.2960), abs=5e-5)
    assert after.tolist() == pytest.approx((0.7873, 0.6252, 0.3918), abs=5e-5)


def test_sr_7_the_trained_improver_is_the_one_that_improves() -> None:
    _, improver = trained(labelled_loss, TRANSITIVE, double([1 / 3] * 3), alpha=0.8)
    found = (improver * TRANSITIVE.preferences.T).sum(1)
    assert found.tolist() == near(improvements(TRANSITIVE)[1])


@pytest.mark.parametrize("seed", range(20))
def test_sr_7_improvement_holds_for_any_preferences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    upper = rand(4, 4).triu(1)
    bandit = Bandit(
        upper + (1 - upper).T.tril(-1) + torch.eye(4, dtype=torch.float64) / 2,
        rand(4).softmax(0),
        (3 * rand(4, 4)).softmax(1),
        beta=0.05 + rand(1).item(),
    )
    before, after = improvements(bandit)
    assert (after >= before).all()


def win_rates(bandit: Bandit, start: Tensor, num_revisions: int) -> list[float]:
    """Against uniform, after 0, 1, ... revisions by the optimal improver."""
    _, improver, _ = bandit.closed_form()
    rates, policy = [], start
    for _ in range(num_revisions + 1):
        rates.append((policy @ bandit.preferences).mean().item())
        policy = policy @ improver
    return rates


def test_sr_8_revisions_from_uniform_are_a_markov_chain_that_levels_off() -> None:
    found = win_rates(TRANSITIVE, double([1 / 3] * 3), 5)
    expected = (0.5, 0.599851, 0.600932, 0.600721, 0.600720, 0.600720)
    assert found == pytest.approx(expected, abs=PRINTED)


def test_sr_8_from_the_optimal_generator_revisions_do_not_help() -> None:
    _, _, generator = TRANSITIVE.closed_form()
    assert generator.tolist() == pytest.approx((0.123611, 0.255845, 0.620544), abs=PRINTED)
    found = win_rates(TRANSITIVE, generator, 5)
    assert found[:2] == pytest.approx((0.601350, 0.600726), abs=PRINTED)
    assert found[2:] == pytest.approx([0.60072] * 4, abs=5e-6)
    assert max(found) == found[0]


def test_sr_8_of_intransitive_preferences_they_can_hurt() -> None:
    _, _, generator = THREE.closed_form()
    found = win_rates(THREE, generator, 2)
    assert found == pytest.approx((0.5049, 0.5052, 0.4998), abs=5e-5)
