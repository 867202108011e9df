"""Laws of lists: their metrics, their trainings from end to end, and the runs beside them."""

import itertools
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from trainings import Curve, name_x, outputs_of_x, train_x, write_prompts

from prefopt.metrics import best_of_kl_bound
from prefopt.packing import slots_of
from stages import complete, label, reference, tracking
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    LISTS,
    LISTS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    SFT,
    TEMPLATES,
    digest,
    logratios_of,
    model_of,
    read_table,
    samples_of,
    write_table,
)
from stages.best_of import best_of, first_best
from stages.evidence import Evidence, Models
from stages.models import load_policy
from stages.offline import ranked
from stages.params import load_params
from stages.rewards import Text, load_reward
from stages.runs import check_runs
from stages.templates import Template, Templates, write_templates

K = 16
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 8, 3, 5
WORDS = [" good", " bad", " fine", " awful", " great", " dull", " nice", " film", " plot", " poor"]

SETTINGS = {"beta": 0.5, "temperature": 0.3}
LISTWISE: dict[str, dict[str, Any]] = {
    "exo_rw": SETTINGS,
    "dpo_rw": SETTINGS,
    "infonca": SETTINGS,
    "nca": SETTINGS,
    "f_po": SETTINGS | {"divergence": "jensen_shannon"},
}
Train = Callable[..., Curve]


@pytest.fixture
def trained(base: Path, write_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Rank K candidates of each prompt by VADER, and train run `x`; returns its curve."""
    shutil.copytree(base, SFT)
    draw = random.Random(0)
    tokenizer = byte_tokenizer()
    splits = ["train"] * NUM_TRAIN + ["validation"] * NUM_VALIDATION + ["test"] * NUM_TEST
    prompts = [[0, *tokenizer.encode(f"No {number}:")] for number in range(len(splits))]
    write_prompts(splits, prompts, [f"No {number}:" for number in range(len(splits))])
    texts = [
        "".join(draw.sample(WORDS, draw.randint(1, 2)))
        for _ in range(K * (NUM_TRAIN + NUM_VALIDATION))
    ]
    candidates = {
        "prompt": [number // K for number in range(len(texts))],
        "text": texts,
        "tokens": [[*tokenizer.encode(text), 1] for text in texts],
    }
    write_table(CANDIDATES, candidates, CANDIDATES_SCHEMA)
    empty: list[Any] = [[] for _ in splits]
    write_table(LISTS, {"completions": empty, "rewards": empty}, LISTS_SCHEMA)
    plain = Template([[0], "prompt", []])
    write_templates(TEMPLATES, Templates(plain, Template([[0], "prompt", "completion"]), eos=1))
    name_x(monkeypatch)

    def run(row: dict[str, Any], num_ranked: int = 4, **changes: Any) -> Curve:
        defaults = {
            "runs": {"x": row},
            "sample.num_completions": K,
            "label.num_ranked": num_ranked,
            "train.batch_size": 3,
            "train.learning_rate": 0.003,
            "train.num_epochs": 2,
            "compute.token_budget": 150,
            "compute.checkpoint_every": 1,
            "data.max_completion_tokens": 12,
            "watch.every": 2,
            "watch.num_generations": 0,
        }
        write_params(**defaults | changes)
        check_runs(load_params())
        label.main()
        reference.main()
        return train_x()

    return run


@pytest.mark.parametrize("loss", LISTWISE)
def test_a_list_loss_trains_from_ranked_completions_to_their_order(
    trained: Train, loss: str
) -> None:
    row = {"loss": loss, "select": "validation/loss", **LISTWISE[loss]}
    # Every step sees all rankings, so that losses of steps compare.
    whole = {"train.batch_size": NUM_TRAIN, "train.num_epochs": 8, "train.learning_rate": 0.01}
    curve = trained(row, **whole)
    first, last = curve[0], curve[-1]
    # At the reference nothing is ranked, and q is uniform but for ties of the best.
    assert float(first["rankings/correlation"]) == pytest.approx(0, abs=0.5)
    assert float(first["rewards/margins"]) == pytest.approx(0, abs=1e-4)
    assert 1 / 4 - 1e-4 < float(first["rankings/mass_on_best"]) < 0.6
    assert float(last["rankings/correlation"]) > 0.5
    assert float(last["rankings/mass_on_best"]) > float(first["rankings/mass_on_best"]) + 0.05
    assert float(last["rewards/margins"]) > 0.1
    assert float(last["loss"]) < float(first["loss"])
    looked = [int(row["step"]) for row in curve if row["validation/loss"]]
    assert looked == [1, 3, 5, 7]
    pairs = Evidence().pairs_of("train")
    assert len(read_table(logratios_of("x"), LOGRATIOS_SCHEMA)["chosen"]) == len(pairs)


class Killed(Exception):
    """What stands in for a killed process."""


def test_a_list_training_that_was_killed_resumes_to_the_same_bits(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"loss": "exo_rw", **SETTINGS}
    trained(row)
    straight = outputs_of_x()
    steps = itertools.count()
    log = tracking.Curve.log

    def killing(*arguments: Any) -> None:
        if next(steps) == 3:
            raise Killed
        log(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tracking.Curve, "log", killing)
        with pytest.raises(Killed):
            trained(row)
    trained(row)
    assert outputs_of_x() == straight


@pytest.mark.parametrize("num_ranked", [2, 8, K])
def test_a_list_of_k_computes_its_prompt_once(
    trained: Train, monkeypatch: pytest.MonkeyPatch, num_ranked: int
) -> None:
    """Counted where tokens enter the model."""
    trained({"loss": "exo_rw", **SETTINGS}, num_ranked)
    evidence, policy = Evidence(), load_policy(str(SFT))
    slots = 0

    def count(_: Any, arguments: tuple[torch.Tensor, ...], __: Any) -> None:
        nonlocal slots
        slots += arguments[0].numel()

    policy.get_input_embeddings().register_forward_hook(count)
    rankings = [0, 1, 2]
    batch = evidence.batch("Rankings", rankings, rankings, Models(policy, None, torch.float32))
    assert batch.rewards.shape == batch.completions.logp.shape == (3, num_ranked)
    rows = [row for ranking in rankings for row in evidence.rows_of("Rankings", ranking)]
    prompts = sum(len(evidence.rows_of("Rankings", ranking)[0].prompt) for ranking in rankings)
    # A completion's last token predicts nothing.
    assert slots == slots_of(rows) == prompts + sum(len(row.completion) - 1 for row in rows)


def test_pair_runs_train_beside_lists_on_the_best_and_the_worst(trained: Train) -> None:
    """The exponential of -1000 is 0: of two, dpo_rw's target is then one-hot, and it is DPO."""
    as_list = trained({"loss": "dpo_rw", "beta": 0.5, "temperature": 1e-4}, 2)
    of_list = read_table(logratios_of("x"), LOGRATIOS_SCHEMA)
    as_pair = trained({"loss": "dpo", "beta": 0.5}, 2)
    assert len(as_list) == len(as_pair)
    # Rankings of two equal rewards are rankings and no pairs; these prompts have none.
    assert len(Evidence().examples_of("Rankings", "train")) == len(Evidence().pairs_of("train"))
    for one, other in zip(as_list, as_pair, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4)
    found = read_table(logratios_of("x"), LOGRATIOS_SCHEMA)
    assert of_list["chosen"] == pytest.approx(found["chosen"], rel=1e-2, abs=1e-3)


def test_preferred_fine_tuning_raises_the_chosen_and_needs_no_ranking(trained: Train) -> None:
    curve = trained({"loss": "preferred_ft"}, **{"label.num_ranked": None})
    assert float(curve[-1]["logps/chosen"]) > float(curve[0]["logps/chosen"]) + 1
    assert float(curve[0]["loss"]) == pytest.approx(-float(curve[0]["logps/chosen"]), rel=1e-5)


@pytest.mark.parametrize(
    ("implicit", "rewards", "correlation", "mass"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], 0.0, 1 / 3),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0, math.exp(3) / sum(map(math.exp, (1, 2, 3)))),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -1.0, math.exp(1) / sum(map(math.exp, (1, 2, 3)))),
        # Two pairs of rewards differ: one is in order, one is a tie of the policy's.
        ([0.0, 1.0, 1.0], [0.0, 0.0, 5.0], 0.5, math.e / (1 + 2 * math.e)),
        ([0.0, 1.0, 2.0], [7.0, 7.0, 7.0], 0.0, 1.0),
    ],
)
def test_rank_correlation_and_mass_on_the_best_by_hand(
    implicit: list[float], rewards: list[float], correlation: float, mass: float
) -> None:
    found = ranked(torch.tensor([implicit]), torch.tensor([rewards]))
    assert found["rankings/correlation"].item() == pytest.approx(correlation, abs=1e-6)
    assert found["rankings/mass_on_best"].item() == pytest.approx(mass, rel=1e-5)


# Best of N


def test_best_of_n_leaves_sft_as_it_is_and_keeps_the_best_of_its_draws(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained({"best_of": 3, "seed": 5}) == []
    assert digest(model_of("x")) == digest(SFT)
    logratios = read_table(logratios_of("x"), LOGRATIOS_SCHEMA)
    assert set(logratios["chosen"]) == set(logratios["rejected"]) == {0.0}

    def drawn(row: dict[str, Any], seed: int) -> dict[str, list[Any]]:
        trained(row, **{"compute.seed": seed})
        monkeypatch.setattr(sys, "argv", ["complete", "x"])
        complete.main()
        return read_table(samples_of("x"), SAMPLES_SCHEMA)

    samples = drawn({"best_of": 3, "seed": 5}, 0)
    assert len(samples["prompt"]) == NUM_TEST
    assert samples["logp"] == pytest.approx(samples["reference_logp"], abs=1e-4)
    again = drawn({"best_of": 3}, 5)
    assert again["seed"] == samples["seed"]
    assert again["text"] == samples["text"]
    assert drawn({"best_of": 3, "seed": 6}, 0)["seed"] != samples["seed"]
    reward = load_reward(load_params(), "vader")
    seeds = complete.seeds_of(samples["prompt"], 5, 0, of_sft=False, num_draws=3)
    assert len(set(seeds)) == 3 * NUM_TEST
    # The first of each prompt's draws is the one that a run would draw.
    assert seeds[::3] == complete.seeds_of(samples["prompt"], 5, 0, of_sft=False)
    assert all(seed in seeds[3 * i : 3 * i + 3] for i, seed in enumerate(samples["seed"]))
    texts = read_table(PROMPTS, PROMPTS_SCHEMA)["text"]
    kept = zip(samples["prompt"], samples["text"], strict=True)
    assert all(map(math.isfinite, reward([Text(texts[prompt], text) for prompt, text in kept])))


def test_the_first_of_the_highest_reward_of_each_group_is_kept() -> None:
    assert first_best([0.0, 2.0, 2.0, -1.0, -3.0, -2.0], 3) == [1, 3]


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_kl_of_best_of_n_is_below_its_bound_and_near_it_where_nothing_is_likely(n: int) -> None:
    """By enumeration: pi_n is the increment of F^n over the completions, sorted by reward."""

    def kl(probabilities: np.ndarray) -> float:
        cumulative = np.concatenate([[0.0], np.cumsum(probabilities)])
        kept = np.diff(cumulative**n)
        seen = kept > 0
        return float((kept[seen] * np.log(kept[seen] / probabilities[seen])).sum())

    bound = best_of_kl_bound(n)
    assert kl(np.full(100_000, 1e-5)) == pytest.approx(bound, abs=1e-3)
    for probabilities in np.random.default_rng(0).dirichlet(np.full(6, 0.5), size=50):
        assert kl(probabilities) < bound
    assert kl(np.array([0.5, 0.5])) < bound - 0.05


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"best_of": 1}, r"runs\.x\.best_of: must be greater than or equal to 2, got 1"),
        ({"best_of": 2.5}, r"runs\.x\.best_of: must be a valid integer, got 2\.5"),
        (
            {"best_of": 4, "loss": "dpo"},
            r"runs\.x\.loss: no such key, got 'dpo'; known: best_of",
        ),
        (
            {"bestof": 4},
            r"runs\.x\.loss: no such loss, got None; .* or best_of in the place",
        ),
        ({"loss": "exo_rw", **SETTINGS, "sft_weight": 0.1}, r"runs\.x\.sft_weight: adds the NLL"),
    ],
)
def test_rows_that_make_no_sense_are_refused(
    write_params: Callable[..., Any], row: dict[str, Any], message: str
) -> None:
    write_params(**{"runs": {"x": row}, "label.num_ranked": 4})
    with pytest.raises(ValueError, match=message):
        check_runs(load_params())


def test_lists_without_rankings_and_more_ranked_than_sampled_are_refused(
    write_params: Callable[..., Any],
) -> None:
    write_params(runs={"x": {"loss": "exo_rw", **SETTINGS}})
    with pytest.raises(ValueError, match=r"'exo_rw' reads rankings .* got label.num_ranked: null"):
        check_runs(load_params())
    for num_ranked, message in (
        (7, "label.num_ranked: more than a prompt has completions, got 7; at most sample.num_com"),
        (1, "label.num_ranked: must be greater than or equal to 2, got 1"),
        (17, "label.num_ranked: must be less than or equal to 16, got 17"),
    ):
        write_params(**{"label.num_ranked": num_ranked})
        with pytest.raises(ValueError, match=message):
            load_params()


def test_a_run_that_trains_is_not_best_of_n(write_params: Callable[..., Any]) -> None:
    write_params(runs={"x": {"loss": "dpo", "beta": 0.1}, "y": {"best_of": 4}})
    params = load_params()
    assert best_of(params, "x") is None
    assert best_of(params, "sft") is None
    assert [run.loss.name for run in check_runs(params)] == ["dpo"]
