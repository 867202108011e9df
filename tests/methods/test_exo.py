"""The checks of EXO: lists, pairs, and the limit of all candidates."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from tabular import double, gradient, kl, minimise, pairs, rankings
from torch import Tensor

from prefopt.divergences import divergence
from prefopt.losses.listwise import dpo_rw, exo_rw, f_po
from prefopt.losses.pairwise import dpo, exo_pref

PRINTED = 5e-7
EPSILONS = [1e-3, 0.05, 0.1]

# EX-4's list, and the reference that EX-5 to EX-7 draw candidates from.
LOGRATIOS = double([0.2, -0.3, 0.1, 0.4])
REWARDS = double([1.0, 0.0, -0.5, 2.0])
REFERENCE = double([0.1, 0.2, 0.3, 0.4])
BETA = TEMPERATURE = 0.5

# Each completion as often among ten candidates as the reference writes it: the limit of K towards
# infinity, exactly, because a softmax over copies is the softmax weighted by the reference.
ALL_CANDIDATES = torch.tensor([0] + [1] * 2 + [2] * 3 + [3] * 4)

Loss = Callable[..., Tensor]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def log_sigmoid(z: float) -> float:
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def exo_pair(z: float, epsilon: float) -> float:
    """Eq. 16 of the paper, as TRL's exo_pair writes it."""
    chosen = sigmoid(z) * (log_sigmoid(z) - math.log(1 - epsilon))
    return chosen + sigmoid(-z) * (log_sigmoid(-z) - math.log(epsilon))


def tempered(policy: Tensor, beta: float = BETA) -> Tensor:
    """pi^beta pi_ref^(1 - beta), normalised."""
    return (beta * policy.log() + (1 - beta) * REFERENCE.log()).softmax(0)


def tilted(temperature: float = TEMPERATURE) -> Tensor:
    return (REFERENCE.log() + REWARDS / temperature).softmax(0)


def of_all_candidates(loss: Loss, logits: Tensor, **hyperparameters: float) -> Tensor:
    u = logits.log_softmax(0) - REFERENCE.log()
    batch = rankings(u[ALL_CANDIDATES], REWARDS[ALL_CANDIDATES])
    return loss(batch, **hyperparameters).sum()


def test_ex_1_dpo_rw_of_two_with_a_one_hot_target_is_dpo() -> None:
    z = torch.linspace(-40, 40, 33, dtype=torch.float64)
    lists = rankings(torch.stack([z, 0.3 * z], 1), [1.0, 0.0])
    # exp(-1000) is zero: the target is one-hot.
    found = dpo_rw(lists, beta=0.1, temperature=1e-3)
    assert found.tolist() == pytest.approx(dpo(pairs(z, 0.3 * z), beta=0.1).tolist(), rel=1e-12)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_ex_1_exo_pref_is_exo_rw_of_two_and_the_papers_pairwise_form(epsilon: float) -> None:
    z = torch.linspace(-40, 40, 33, dtype=torch.float64)
    pair = pairs(z, 0.3 * z)
    lists = rankings(torch.stack([z, 0.3 * z], 1), [math.log((1 - epsilon) / epsilon), 0.0])
    found = exo_pref(pair, beta=0.1, label_smoothing=epsilon).tolist()
    assert found == pytest.approx(
        exo_rw(lists, beta=0.1, temperature=1.0).tolist(), rel=1e-12, abs=1e-12
    )
    expected = [exo_pair(0.1 * h, epsilon) for h in pair.margin.tolist()]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    # And the forward KL's list is conservative DPO.
    assert dpo_rw(lists, beta=0.1, temperature=1.0).tolist() == pytest.approx(
        dpo(pair, beta=0.1, label_smoothing=epsilon).tolist(), rel=1e-12
    )


STATIONARY = math.log(0.999 / 0.001)


@pytest.mark.parametrize(
    ("z", "loss", "slope", "of_dpo"),
    [
        (-2.0, 5.719116, -0.935152, 2.126928),
        (0.0, 2.761231, -1.726689, 0.693147),
        (1.0, 1.276310, -1.161338, 0.313262),
        (2.0, 0.458972, -0.515178, 0.126928),
        (STATIONARY, 0.0, 0.0, 0.001001),
        (8.0, 2.985e-4, 3.665e-4, 3.354e-4),
    ],
)
def test_ex_2_exo_pref_and_dpo_have_the_tables_values(
    z: float, loss: float, slope: float, of_dpo: float
) -> None:
    printed = 5e-8 if z == 8 else PRINTED

    def exo(h: Tensor) -> Tensor:
        return exo_pref(pairs(h, 0.0 * h), beta=1.0, label_smoothing=1e-3)

    assert exo(double(z)).item() == pytest.approx(loss, abs=printed)
    (found,) = gradient(exo, z)
    assert found.item() == pytest.approx(slope, abs=printed)
    formula = sigmoid(z) * sigmoid(-z) * (z - STATIONARY)
    assert found.item() == pytest.approx(formula, rel=1e-9, abs=1e-14)
    assert dpo(pairs(z, 0.0), beta=1.0).item() == pytest.approx(of_dpo, abs=printed)
    (of_dpos,) = gradient(lambda h: dpo(pairs(h, 0.0 * h), beta=1.0), z)
    assert of_dpos.item() < 0


@pytest.mark.parametrize(
    ("epsilon", "z", "margin"),
    [(1e-3, 6.906755, 69.07), (0.05, 2.944439, 29.44), (0.1, 2.197225, 21.97)],
)
def test_ex_3_exo_pref_is_smallest_at_the_log_odds_of_its_smoothing(
    epsilon: float, z: float, margin: float
) -> None:
    def loss(h: Tensor) -> Tensor:
        return exo_pref(pairs(h, 0.0 * h), beta=0.1, label_smoothing=epsilon).sum()

    found = minimise(loss, [20.0]).item()
    assert found == pytest.approx(math.log((1 - epsilon) / epsilon) / 0.1, abs=1e-6)
    assert found == pytest.approx(margin, abs=5e-3)
    assert 0.1 * found == pytest.approx(z, abs=PRINTED)
    assert loss(double([found])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("z", "loss"),
    [(10.0, (-4.53989e-5, 5e-11)), (0.0, (4.306853, PRINTED))],
)
def test_ex_3_the_repositorys_log_labels_are_an_exo_pref_less_a_constant(
    z: float, loss: tuple[float, float]
) -> None:
    repository = sigmoid(z) * log_sigmoid(z) + sigmoid(-z) * (log_sigmoid(-z) + 10)
    assert repository == pytest.approx(loss[0], abs=loss[1])

    def ours(h: Tensor) -> Tensor:
        return exo_pref(pairs(h, 0.0 * h), beta=1.0, label_smoothing=sigmoid(-10))

    assert ours(double(z)).item() - math.log1p(math.exp(-10)) == pytest.approx(
        repository, abs=1e-12
    )
    (slope,) = gradient(ours, 10.0)
    assert slope.item() == pytest.approx(0, abs=1e-14)


def test_ex_4_four_completions_have_the_tables_values_and_gradients() -> None:
    q = (BETA * LOGRATIOS).softmax(0)
    p = (REWARDS / TEMPERATURE).softmax(0)
    assert q.tolist() == pytest.approx((0.260743, 0.203066, 0.248026, 0.288165), abs=PRINTED)
    assert p.tolist() == pytest.approx((0.116629, 0.015784, 0.005807, 0.861780), abs=PRINTED)

    def value_and_slope(loss: Loss) -> tuple[float, list[float]]:
        def function(u: Tensor) -> Tensor:
            return loss(rankings(u, REWARDS), beta=BETA, temperature=TEMPERATURE)

        return function(LOGRATIOS).item(), gradient(function, LOGRATIOS)[0].tolist()

    value, slope = value_and_slope(exo_rw)
    assert value == pytest.approx(1.344063, abs=PRINTED)
    assert value == pytest.approx(kl(q, p).item(), rel=1e-12)
    assert slope == pytest.approx((-0.070339, 0.122903, 0.298930, -0.351494), abs=PRINTED)
    formula = BETA * q * ((q / p).log() - kl(q, p))
    assert slope == pytest.approx(formula.tolist(), rel=1e-9)

    value, slope = value_and_slope(dpo_rw)
    entropy = -(p * p.log()).sum().item()
    assert value == pytest.approx(1.262280, abs=PRINTED)
    assert kl(p, q).item() == pytest.approx(0.788097, abs=PRINTED)
    assert entropy == pytest.approx(0.474183, abs=PRINTED)
    assert value == pytest.approx(kl(p, q).item() + entropy, rel=1e-12)
    assert slope == pytest.approx((0.072057, 0.093641, 0.121110, -0.286808), abs=PRINTED)
    assert slope == pytest.approx((BETA * (q - p)).tolist(), rel=1e-9)


@pytest.mark.parametrize(("name", "value"), [("reverse_kl", 1.344063), ("forward_kl", 0.788097)])
def test_ex_4_f_po_has_both_divergences_of_the_softmaxes(name: str, value: float) -> None:
    found = f_po(
        rankings(LOGRATIOS, REWARDS),
        beta=BETA,
        temperature=TEMPERATURE,
        divergence=divergence(name),
    )
    assert found.item() == pytest.approx(value, abs=PRINTED)


LISTWISE = [exo_rw, dpo_rw, partial(f_po, divergence=divergence("squared_hellinger"))]


@pytest.mark.parametrize("loss", LISTWISE, ids=["exo_rw", "dpo_rw", "f_po"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 0.5), (1.0, 0.25), (0.25, 1.0)])
def test_ex_5_the_minimiser_over_all_candidates_is_the_tilt_by_both_tempers(
    loss: Loss, beta: float, temperature: float
) -> None:
    found = minimise(
        lambda x: of_all_candidates(loss, x, beta=beta, temperature=temperature),
        [0.0, 0.0, 0.0, 0.0],
    ).softmax(0)
    expected = (REFERENCE.log() + REWARDS / (beta * temperature)).softmax(0)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.tolist() == pytest.approx((0.004557, 0.000167, 0.000034, 0.995242), abs=1e-6)


def test_ex_5_with_a_uniform_reference_each_completion_once_is_enough() -> None:
    def loss(logits: Tensor) -> Tensor:
        u = logits.log_softmax(0) + math.log(4)
        return exo_rw(rankings(u, REWARDS), beta=BETA, temperature=TEMPERATURE).sum()

    found = minimise(loss, [0.5, 0.0, 0.0, 0.0]).softmax(0)
    expected = (REWARDS / (BETA * TEMPERATURE)).softmax(0)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def random_logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(5)]


def regularised_reward(logits: Tensor) -> Tensor:
    """J of the tempered policy."""
    policy = tempered(logits.softmax(0))
    return (policy * REWARDS).sum() - TEMPERATURE * kl(policy, REFERENCE)


@pytest.mark.parametrize("logits", random_logits())
def test_ex_6_exo_follows_the_gradient_of_the_regularised_reward(logits: Tensor) -> None:
    (of_reward,) = gradient(regularised_reward, logits)
    (of_kl,) = gradient(lambda x: kl(tempered(x.softmax(0)), tilted()), logits)
    expected = (-of_reward / TEMPERATURE).tolist()
    assert of_kl.tolist() == pytest.approx(expected, abs=1e-14)
    exo = partial(of_all_candidates, exo_rw, beta=BETA, temperature=TEMPERATURE)
    (of_exo,) = gradient(exo, logits)
    assert of_exo.tolist() == pytest.approx(expected, abs=1e-14)
    log_z = (REFERENCE * (REWARDS / TEMPERATURE).exp()).sum().log().item()
    total = kl(tempered(logits.softmax(0)), tilted()) + regularised_reward(logits) / TEMPERATURE
    assert total.item() == pytest.approx(log_z, abs=1e-13)
    assert log_z == pytest.approx(3.130636, abs=PRINTED)


EXACT = {
    "exo_rw": (-0.077585, 0.175594, 0.256194, -0.354203),
    "dpo_rw": (0.076619, 0.162066, 0.157042, -0.395726),
}
LOSSES_OF_LISTS = {"exo_rw": exo_rw, "dpo_rw": dpo_rw}


def logits_of_ex_7() -> Tensor:
    return double(np.random.default_rng(1).normal(size=4))


@pytest.mark.parametrize("name", EXACT)
def test_ex_7_the_exact_gradients_are_those_of_the_two_kls(name: str) -> None:
    logits = logits_of_ex_7()
    exact = {
        "exo_rw": lambda x: kl(tempered(x.softmax(0)), tilted()),
        "dpo_rw": lambda x: kl(tilted(), tempered(x.softmax(0))),
    }[name]
    (expected,) = gradient(exact, logits)
    assert expected.tolist() == pytest.approx(EXACT[name], abs=PRINTED)
    loss = LOSSES_OF_LISTS[name]
    (found,) = gradient(
        partial(of_all_candidates, loss, beta=BETA, temperature=TEMPERATURE), logits
    )
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-14)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("exo_rw", (-0.0774, 0.1755, 0.2563, -0.3544)),
        ("dpo_rw", (0.0767, 0.1618, 0.1570, -0.3955)),
    ],
)
def test_ex_7_of_1024_candidates_drawn_from_the_reference_it_comes_near_the_exact_one(
    name: str, printed: tuple[float, ...]
) -> None:
    num_lists, k = 400, 1024
    generator = torch.Generator().manual_seed(2)
    drawn = torch.multinomial(REFERENCE, num_lists * k, replacement=True, generator=generator)
    drawn = drawn.view(num_lists, k)

    def loss(logits: Tensor) -> Tensor:
        u = logits.log_softmax(-1) - REFERENCE.log()  # one policy a list, for one gradient a list
        batch = rankings(u.gather(1, drawn), REWARDS[drawn])
        return LOSSES_OF_LISTS[name](batch, beta=BETA, temperature=TEMPERATURE)

    (slopes,) = gradient(loss, logits_of_ex_7().expand(num_lists, 4))
    error = (slopes.std(0) / math.sqrt(num_lists)).max().item()
    # What is printed is a draw of this size too.
    assert error < 1e-3
    assert slopes.mean(0).tolist() == pytest.approx(EXACT[name], abs=4 * error)
    assert printed == pytest.approx(EXACT[name], abs=4 * error)


def test_ex_7_of_two_candidates_exo_is_biased() -> None:
    def expected(logits: Tensor) -> Tensor:
        u = logits.log_softmax(0) - REFERENCE.log()
        couples = torch.tensor(list(itertools.product(range(4), repeat=2)))
        losses = exo_rw(rankings(u[couples], REWARDS[couples]), beta=BETA, temperature=TEMPERATURE)
        return (REFERENCE[couples].prod(1) * losses).sum()

    (found,) = gradient(expected, logits_of_ex_7())
    # The printed numbers are drawn; these are enumerated.
    assert found.tolist() == pytest.approx((-0.0057, 0.0692, 0.1677, -0.2313), abs=1e-3)
    assert abs(found[3].item() - EXACT["exo_rw"][3]) > 0.1


def test_ex_8_the_forward_kl_takes_the_mean_and_exo_a_mode() -> None:
    y = torch.linspace(-10, 10, 2001, dtype=torch.float64)

    def bell(mean: float, deviation: float) -> Tensor:
        return (-((y - mean) ** 2) / (2 * deviation**2)).exp() / deviation

    log_target = (0.6 * bell(-2, 0.7) + 0.4 * bell(3, 0.7)).log()

    def of_mean(loss: Loss, mu: Tensor) -> Tensor:
        # Over a uniform reference, with all of the grid as candidates.
        u = (-((y - mu[:, None]) ** 2) / 2).log_softmax(-1)
        return loss(rankings(u, log_target), beta=1.0, temperature=1.0)

    # The printed mode is a point of a grid of this step; the minimum itself is at -1.9659.
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    for loss, printed, expected in ((dpo_rw, 0.0, 0.0), (exo_rw, -1.965, -1.965901)):
        start = grid[of_mean(loss, grid).argmin()]
        assert start.item() == pytest.approx(printed, abs=1e-9)
        found = minimise(lambda mu, loss=loss: of_mean(loss, mu).sum(), start[None]).item()
        assert found == pytest.approx(expected, abs=1e-6)
