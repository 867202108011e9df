"""The checks of PsiPO and IPO, and the bandits of its illustrations."""

import math
from collections.abc import Callable
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
    gradient,
    minimise,
    normalised,
    over_pairs,
    pairs,
)
from torch import Tensor

from prefopt.losses.pairwise import dpo, ipo, psi_po
from prefopt.psi import Psi, Q, optimum, psi

PRINTED = 5e-7
TAUS = [0.1, 0.5, 1.0, 10.0]
IDENTITY = psi("identity")
UNIFORM = double([1 / 3] * 3)

# Of Y = {a, b, c}, chosen first. As printed in the paper, D3 cannot show its figure 2: no loss on
# it depends on c. D3'' does.
DATA = {
    "D1": ((0, 1), (1, 2), (0, 2)),
    "D2": ((0, 1), (1, 2), (2, 0)),
    "D3": ((0, 1), (1, 0)),
    "D3'": ((0, 1), (1, 2)),
    "D3''": ((0, 1), (1, 0), (1, 2)),
}
# The logits of IPO's minimiser, in units of 1/tau.
MINIMISERS = {
    "D1": (1 / 3, 0.0, -1 / 3),
    "D2": (0.0, 0.0, 0.0),
    "D3": (0.0, 0.0, 0.0),
    "D3'": (1 / 2, 0.0, -1 / 2),
    "D3''": (0.0, 0.0, -1 / 2),
}


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def together(behaviour: Tensor) -> Tensor:
    """The probability of each ordered pair of draws."""
    return behaviour[:, None] * behaviour[None, :]


def margins(u: Tensor) -> Tensor:
    return u[:, None] - u[None, :]


def random_preferences(generator: torch.Generator, n: int = 4) -> Tensor:
    drawn = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    return drawn + (1 - drawn).T.tril(-1) + torch.eye(n, dtype=torch.float64) / 2


def random_probabilities(generator: torch.Generator, n: int = 4) -> Tensor:
    return normalised(0.1 + torch.rand(n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.5])
def test_ip_1_the_loss_and_its_gradient_are_those_of_a_regression(
    tau: float, margin: float
) -> None:
    def loss(w: Tensor, r: Tensor) -> Tensor:
        return ipo(pairs(w, r), tau=tau)

    target = 1 / (2 * tau)
    value = loss(double(margin + 1), double(1.0)).item()
    assert value == pytest.approx((margin - target) ** 2, rel=1e-12)
    slopes = [g.item() for g in gradient(loss, margin + 1, 1.0)]
    assert slopes == pytest.approx([2 * (margin - target), -2 * (margin - target)], rel=1e-12)


def test_ip_1_at_a_tau_of_a_tenth_the_loss_is_zero_at_a_margin_of_five_alone() -> None:
    values = ipo(pairs([5.0, 4.999, 5.001], [0.0, 0.0, 0.0]), tau=0.1).tolist()
    assert values[0] == 0
    assert min(values[1:]) > 0


@pytest.mark.parametrize(
    ("tau", "printed"), [(0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459), (10.0, 0.512497)]
)
def test_ip_2_of_two_actions_the_winner_gets_a_probability_set_by_tau(
    tau: float, printed: float
) -> None:
    expected = sigmoid(1 / (2 * tau))
    assert expected == pytest.approx(printed, abs=PRINTED)
    halves = double([0.5, 0.5])
    trained = best_policy(lambda u: ipo(pairs(u[:1], u[1:]), tau=tau).sum(), halves)
    assert trained[0].item() == pytest.approx(expected, abs=1e-9)
    certain = double([[0.5, 1.0], [0.0, 0.5]])
    closed_form = optimum(halves, certain, halves, IDENTITY, tau)
    assert closed_form[0].item() == pytest.approx(expected, abs=1e-12)
    # The average over both orders of what eq. 16 labels.
    labels = best_policy(lambda u: over_pairs(partial(ipo, tau=tau), u, certain / 4), halves)
    assert labels[0].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("data", DATA)
def test_ip_3_full_batch_ipo_on_a_data_set_ends_at_its_minimiser(data: str, tau: float) -> None:
    chosen, rejected = (list(side) for side in zip(*DATA[data], strict=True))

    def loss(logits: Tensor) -> Tensor:
        u = logits.log_softmax(0) + math.log(3)
        return ipo(pairs(u[chosen], u[rejected]), tau=tau).mean()

    expected = [x / tau for x in MINIMISERS[data]]
    found = minimise(loss, [0.0, 0.0, 0.0])
    assert found.softmax(0).tolist() == pytest.approx(
        double(expected).softmax(0).tolist(), abs=1e-6
    )
    # From elsewhere too. Logits have a gauge, which descent leaves as it was: their mean, and on
    # D3, where c is in no pair, the logit of c.
    start = double([0.7, -0.4, 0.9])
    found = minimise(loss, start)
    if data == "D3":
        assert found[2].item() == pytest.approx(0.9, abs=1e-12)
        assert (found[0] - found[1]).item() == pytest.approx(0, abs=1e-6)
    else:
        centred = double(expected) - double(expected).mean() + start.mean()
        assert found.tolist() == pytest.approx(centred.tolist(), abs=1e-6)


# The protocol of section 6.4: 18000 steps of Adam, mini-batches of 9 with replacement. The noise of
# a seed at a tau of 0.1 is .04, so that the mean of its 10 seeds would often miss by .02.
NUM_STEPS, LATE, MINI_BATCH, NUM_SEEDS, RATE = 18_000, 17_000, 9, 40, 0.01

# By a pair's margin, with DPO's beta = tau; the run is of these, which are held against the
# library's own gradients.
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ipo": lambda h, tau: 2 * (h - 1 / (2 * tau)),
    "dpo": lambda h, tau: -tau * torch.sigmoid(-tau * h),
}
LOSSES = {"ipo": lambda pair, tau: ipo(pair, tau=tau), "dpo": lambda pair, tau: dpo(pair, beta=tau)}


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Tensor]]:
    """Loss -> logits with axes (data set, tau, seed, action), late in the run and at its end."""
    most = max(map(len, DATA.values()))
    contrasts = torch.zeros(len(DATA), most, 3, dtype=torch.float64)  # of data sets' pairs
    shares = torch.zeros(len(DATA), most, dtype=torch.float64)
    for i, data in enumerate(DATA.values()):
        shares[i, : len(data)] = 1 / len(data)
        for j, (chosen, rejected) in enumerate(data):
            contrasts[i, j, chosen], contrasts[i, j, rejected] = 1, -1
    taus = double(TAUS)[:, None, None]
    logits = {
        name: torch.zeros(len(DATA), len(TAUS), NUM_SEEDS, 3, dtype=torch.float64)
        for name in SLOPES
    }
    optimiser = torch.optim.Adam(logits.values(), lr=RATE)
    late: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(NUM_STEPS):
        if step == LATE:
            late = {name: theta.clone() for name, theta in logits.items()}
        # How often each pair is in the mini-batch; a seed's draws are the same for every tau.
        drawn = torch.multinomial(
            shares, NUM_SEEDS * MINI_BATCH, replacement=True, generator=generator
        ).view(len(DATA), NUM_SEEDS, MINI_BATCH, 1)
        counts = (drawn == torch.arange(most)).sum(2, dtype=torch.float64)[:, None]
        for name, theta in logits.items():
            margin = torch.einsum("dtsa,dpa->dtsp", theta, contrasts)
            slopes = counts * SLOPES[name](margin, taus) / MINI_BATCH
            theta.grad = torch.einsum("dtsp,dpa->dtsa", slopes, contrasts)
        optimiser.step()
    return {name: {"late": late[name], "end": logits[name]} for name in logits}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("tau", TAUS)
def test_ip_3_the_protocols_slopes_are_the_librarys(name: str, tau: float) -> None:
    h = torch.linspace(-30, 30, 61, dtype=torch.float64)
    (expected,) = gradient(lambda w: LOSSES[name](pairs(w, torch.zeros(61)), tau), h)
    found = SLOPES[name](h, double(tau))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("data", DATA)
def test_ip_3_the_stochastic_protocols_mean_ends_at_ipos_minimiser(
    trained: dict[str, dict[str, Tensor]], data: str, tau: float
) -> None:
    logits = trained["ipo"]["end"][list(DATA).index(data), TAUS.index(tau)]
    expected = double([x / tau for x in MINIMISERS[data]]).softmax(0)
    assert logits.softmax(-1).mean(0).tolist() == pytest.approx(expected.tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("data", "tau", "printed"),
    [
        ("D1", 0.1, (1.0, 0.0, 0.0)),
        ("D1", 0.5, (1.0, 0.0, 0.0)),
        ("D1", 1.0, (1.0, 0.0, 0.0)),
        ("D1", 10.0, (0.8181, 0.1532, 0.0287)),
        ("D3'", 1.0, (1.0, 0.0, 0.0)),
    ],
)
def test_ip_3_the_stochastic_protocol_drives_dpo_to_a_deterministic_policy(
    trained: dict[str, dict[str, Tensor]], data: str, tau: float, printed: tuple[float, ...]
) -> None:
    logits = trained["dpo"]["end"][list(DATA).index(data), TAUS.index(tau)]
    assert logits.softmax(-1).mean(0).tolist() == pytest.approx(printed, abs=0.02)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_ip_3_dpo_drives_what_never_wins_to_zero_for_every_tau_and_ipo_does_not(
    trained: dict[str, dict[str, Tensor]], tau: float
) -> None:
    at = list(DATA).index("D3''"), TAUS.index(tau)
    never_wins = {name: run["end"][at].softmax(-1)[:, 2].mean() for name, run in trained.items()}
    assert never_wins["dpo"].item() == pytest.approx(0, abs=5e-5)
    assert never_wins["ipo"].item() == pytest.approx(
        {0.1: 0.0034, 0.5: 0.1554, 1.0: 0.2327}[tau], abs=0.02
    )


def eq_13(u: Tensor, preferences: Tensor, behaviour: Tensor, tau: float) -> Tensor:
    worth = preferences @ behaviour
    return (together(behaviour) * (margins(u) - margins(worth) / tau) ** 2).sum()


def eq_16(u: Tensor, preferences: Tensor, behaviour: Tensor, tau: float) -> Tensor:
    """The labels I in expectation."""
    won, lost = (margins(u) - 1 / tau) ** 2, margins(u) ** 2
    return (together(behaviour) * (preferences * won + (1 - preferences) * lost)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_ip_4_the_regressions_on_utilities_labels_and_pairs_differ_by_constants(
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tau = 0.7
    preferences = random_preferences(generator)
    behaviour, reference = random_probabilities(generator), random_probabilities(generator)
    offsets = []
    for _ in range(3):
        u = (random_probabilities(generator) / reference).log()
        exact = eq_13(u, preferences, behaviour, tau)
        # A draw (y, y') of which y wins with p is the pair (y, y') with p and (y', y) with 1 - p.
        weights = 2 * together(behaviour) * preferences
        soft = partial(psi_po, tau=tau, psi=IDENTITY)
        offsets.append(
            [
                (loss - exact).item()
                for loss in (
                    eq_16(u, preferences, behaviour, tau),
                    over_pairs(partial(ipo, tau=tau), u, weights),
                    over_pairs(soft, u, together(behaviour), preferences),
                )
            ]
        )
    for other in offsets[1:]:
        assert other == pytest.approx(offsets[0], abs=1e-12)
    # Of the two terms of a datum: their mean is eq. 17's square and 1/(4 tau^2).
    assert offsets[0][0] - offsets[0][1] == pytest.approx(1 / (4 * tau**2), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ip_5_the_closed_form_has_no_loss_and_is_where_pairs_lead(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tau = 0.7
    preferences = random_preferences(generator)
    behaviour, reference = random_probabilities(generator), random_probabilities(generator)
    best = optimum(reference, preferences, behaviour, IDENTITY, tau)
    expected = normalised(reference * ((preferences @ behaviour) / tau).exp())
    assert best.tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    loss = eq_13((best / reference).log(), preferences, behaviour, tau)
    assert loss.item() == pytest.approx(0, abs=1e-28)
    weights = together(behaviour) * preferences
    found = best_policy(lambda u: over_pairs(partial(ipo, tau=tau), u, weights), reference)
    assert found.tolist() == pytest.approx(best.tolist(), abs=1e-9)


def test_ip_6_without_pairs_of_an_action_its_mass_changes_no_loss() -> None:
    behaviour = double([0.6, 0.4, 0.0])
    weights = together(behaviour) * INTRANSITIVE
    values = []
    for mass in (0.01, 0.3, 0.9):
        policy = double([0.7 * (1 - mass), 0.3 * (1 - mass), mass])
        u = (policy / REFERENCE_OF_THREE).log()
        values.append(over_pairs(partial(ipo, tau=0.5), u, weights).item())
    assert values == pytest.approx([values[0]] * 3, abs=1e-13)


MOVED = [
    (0.528754, 0.259744, 0.211502),
    (0.517719, 0.167102, 0.315179),
    (0.406679, 0.386525, 0.206796),
]


@pytest.mark.parametrize(("behaviour", "printed"), list(zip(BEHAVIOURS, MOVED, strict=True)))
def test_ip_7_ipos_optimum_moves_with_the_behaviour_policy(
    behaviour: tuple[float, ...], printed: tuple[float, ...]
) -> None:
    tau, mu = 0.5, double(behaviour)
    loss = partial(ipo, tau=tau)
    found = best_policy(
        lambda u: over_pairs(loss, u, together(mu) * INTRANSITIVE), REFERENCE_OF_THREE
    )
    assert found.tolist() == pytest.approx(printed, abs=1e-6)
    expected = optimum(REFERENCE_OF_THREE, INTRANSITIVE, mu, IDENTITY, tau)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_ip_7_dpos_optimum_moves_with_it_only_where_no_reward_explains_the_preferences() -> None:
    def optimum_of(preferences: Tensor, behaviour: tuple[float, ...]) -> Tensor:
        weights = together(double(behaviour)) * preferences
        loss = partial(dpo, beta=0.5)
        return best_policy(lambda u: over_pairs(loss, u, weights), REFERENCE_OF_THREE)

    rewards = double([0.0, 0.5, 1.0])
    expected = normalised(REFERENCE_OF_THREE * (rewards / 0.5).exp())
    for behaviour in BEHAVIOURS:
        found = optimum_of(bradley_terry(rewards), behaviour)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    first, *others = (optimum_of(INTRANSITIVE, behaviour) for behaviour in BEHAVIOURS)
    assert all((other - first).abs().max() > 0.01 for other in others)


ODD = {
    "identity": IDENTITY,
    "logit": psi({"logit": 1e-6}),  # no preference here is within 1e-6 of 0 or 1
    "cubic": psi("(q-1/2)**3"),
}
SQUARE = Psi("q**2", Q**2, 0.0)  # as the parser would make it, which refuses it


def one_sided(u: Tensor, behaviour: Tensor, utility: Psi, tau: float) -> Tensor:
    """The regression of 6.3 on one order of each pair."""
    return (together(behaviour) * (margins(u) - utility(INTRANSITIVE) / tau) ** 2).sum()


def three_sample(u: Tensor, behaviour: Tensor, utility: Psi, tau: float) -> Tensor:
    """The regression of 6.3 on y and y', each compared with the same y''."""
    worth = utility(INTRANSITIVE)
    targets = (worth[:, None, :] - worth[None, :, :]) / tau
    squares = (margins(u)[:, :, None] - targets) ** 2
    return (together(behaviour)[:, :, None] * behaviour * squares).sum()


def by_psi_po(u: Tensor, behaviour: Tensor, utility: Psi, tau: float) -> Tensor:
    return over_pairs(partial(psi_po, tau=tau, psi=utility), u, together(behaviour), INTRANSITIVE)


Regression = Callable[[Tensor, Tensor, Psi, float], Tensor]


def reached(regression: Regression, behaviour: Tensor, utility: Psi, tau: float) -> Tensor:
    return best_policy(lambda u: regression(u, behaviour, utility, tau), REFERENCE_OF_THREE)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("regression", [one_sided, three_sample, by_psi_po])
def test_ip_8_regression_of_an_odd_psi_reaches_the_closed_form(
    regression: Regression, name: str, behaviour: tuple[float, ...]
) -> None:
    mu = double(behaviour)
    formula = {
        "identity": INTRANSITIVE,
        "logit": (INTRANSITIVE / (1 - INTRANSITIVE)).log(),
        "cubic": (INTRANSITIVE - 0.5) ** 3,
    }[name]
    expected = normalised(REFERENCE_OF_THREE * (formula @ mu / 0.5).exp())
    closed_form = optimum(REFERENCE_OF_THREE, INTRANSITIVE, mu, ODD[name], 0.5)
    assert closed_form.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    found = reached(regression, mu, ODD[name], 0.5)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_ip_8_psi_po_is_the_one_sided_regression_less_a_constant(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mu = double(BEHAVIOURS[1])
    offsets = []
    for _ in range(3):
        u = torch.randn(3, generator=generator, dtype=torch.float64)
        difference = one_sided(u, mu, ODD[name], 0.5) - by_psi_po(u, mu, ODD[name], 0.5)
        offsets.append(difference.item())
    assert offsets == pytest.approx([offsets[0]] * 3, rel=1e-12)


@pytest.mark.parametrize("name", ODD)
def test_ip_8_psi_po_of_one_order_of_each_pair_is_enough(name: str) -> None:
    mu = double(BEHAVIOURS[1])
    loss = partial(psi_po, tau=0.5, psi=ODD[name])
    one_order = together(mu).triu(1)
    found = best_policy(lambda u: over_pairs(loss, u, one_order, INTRANSITIVE), REFERENCE_OF_THREE)
    expected = optimum(REFERENCE_OF_THREE, INTRANSITIVE, mu, ODD[name], 0.5)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_ip_8_psi_po_of_the_identity_and_a_hard_label_is_ipo() -> None:
    pair = pairs([0.3, -2.0, 7.0], [-1.0, 4.0, 2.0])
    found = psi_po(pair, tau=0.1, psi=IDENTITY)
    assert found.tolist() == pytest.approx(ipo(pair, tau=0.1).tolist(), rel=1e-12)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_ip_8_one_sided_regression_of_the_square_misses_and_three_samples_do_not(
    behaviour: tuple[float, ...],
) -> None:
    mu, tau = double(behaviour), 0.5
    wanted = normalised(REFERENCE_OF_THREE * (INTRANSITIVE**2 @ mu / tau).exp())
    found = reached(three_sample, mu, SQUARE, tau)
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    missed = reached(one_sided, mu, SQUARE, tau)
    # q^2 - (1 - q)^2 = 2 q - 1: it reaches the identity's optimum instead.
    identitys = optimum(REFERENCE_OF_THREE, INTRANSITIVE, mu, IDENTITY, tau)
    assert missed.tolist() == pytest.approx(identitys.tolist(), abs=1e-6)
    error = (missed / wanted).log()
    assert (error - error.mean()).abs().max() > 0.03


def test_ip_8_the_square_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError,
        match=r"psi 'q\*\*2' is not odd about 1/2.*psi\(q\) \+ psi\(1 - q\) is not constant.*"
        r"would not reach the optimum of eq\. 7.*odd part 'q - 1/2'",
    ):
        psi("q**2")


@pytest.mark.parametrize("tau", TAUS)
def test_ip_9_on_a_total_order_dpos_margin_still_grows_at_the_last_step(
    trained: dict[str, dict[str, Tensor]], tau: float
) -> None:
    at = list(DATA).index("D1"), TAUS.index(tau)
    late, end = (trained["dpo"][when][at] for when in ("late", "end"))
    growth = (end[:, 0] - end[:, 1]) - (late[:, 0] - late[:, 1])
    assert (growth > 0).all()
    chosen, rejected = (list(side) for side in zip(*DATA["D1"], strict=True))

    def loss(logits: Tensor) -> Tensor:
        u = logits.log_softmax(0) + math.log(3)
        return dpo(pairs(u[chosen], u[rejected]), beta=tau).mean()

    for logits in end:
        (slope,) = gradient(loss, logits)
        assert slope[0] < 0 < slope[2]


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_ip_9_ipos_margin_does_not_grow_on(
    trained: dict[str, dict[str, Tensor]], tau: float
) -> None:
    at = list(DATA).index("D1"), TAUS.index(tau)
    late, end = (
        (run[:, 0] - run[:, 1]).mean().item()
        for run in (trained["ipo"]["late"][at], trained["ipo"]["end"][at])
    )
    assert (late, end) == pytest.approx((1 / (3 * tau),) * 2, abs=0.1)
