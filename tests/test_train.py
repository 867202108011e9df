"""Laws of a training stage: its evidence, its first step, its metrics."""

import copy
import functools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, llama
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.batches import Pairs, Scored
from prefopt.checkpoints import Metrics
from prefopt.divergences import DIVERGENCES
from prefopt.loop import Optimisation, fit
from prefopt.losses import LOSSES
from prefopt.losses.formulas import value as formula
from prefopt.packing import Row, Steps
from prefopt.proofs import Case, batch_of, cases
from prefopt.scoring import batches, token_logps
from stages import label, offline, params, train, training
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    RANKINGS,
    RANKINGS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    write_table,
)
from stages.evidence import Evidence, Models
from stages.runs import TRAINABLE, Run
from stages.templates import Template, Templates

load_params = functools.partial(params.load_params, PROJECT / "params.yaml")


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    monkeypatch.chdir(tmp_path)
    COMPLETIONS.parent.mkdir()
    completions = {"prompt": [[1], [1], [1, 2]], "completion": [[3], [4, 5], [6, 7, 8]]}
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    pairs = {
        "split": ["train", "train"],
        "chosen": [2, 0],
        "rejected": [1, 1],
        "preference": [1.0, 0.75],
    }
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    reference = {"logps": [[-1.0], [-1.0, -2.0], [-1.0, -2.0, -4.0]]}
    write_table(REFERENCE, reference, REFERENCE_SCHEMA)
    return Evidence()


def test_a_batch_holds_the_rows_that_its_pairs_point_at(evidence: Evidence) -> None:
    logps = [
        torch.tensor([-0.5]),
        torch.tensor([-2.0, -1.0, -3.0]),
        torch.tensor([-1.0, -1.0]),
        torch.zeros(2),
    ]
    pairs = evidence.paired([1, 0], logps)
    assert pairs.chosen.reference_logp.tolist() == [-1.0, -7.0]
    assert pairs.rejected.reference_logp.tolist() == [-3.0, -3.0]
    assert pairs.chosen.logp.tolist() == [-0.5, -6.0]
    assert pairs.chosen.tokens.tolist() == [1, 3]
    assert pairs.rejected.tokens.tolist() == [2, 2]
    assert pairs.preference.tolist() == [0.75, 1.0]


def test_tokens_are_counted_with_their_prompts_and_without_padding(
    evidence: Evidence,
) -> None:
    first = (2 + 3) + (1 + 2)
    assert evidence.num_tokens("Pairs", [0]) == first
    assert evidence.num_tokens("Pairs", [0, 1]) == first + (1 + 1) + (1 + 2)


def test_tokens_before_a_step_are_those_of_all_earlier_ones(evidence: Evidence) -> None:
    steps = Steps(num_rows=2, batch_size=1, num_epochs=2, seed=0)
    before = offline.TokensBefore(evidence, "Pairs", steps)
    resumed = offline.TokensBefore(evidence, "Pairs", steps)
    assert [before(step) for step in range(4)] == [
        sum(evidence.num_tokens("Pairs", pairs) for pairs in list(steps)[:step])
        for step in range(4)
    ]
    assert resumed(3) == before(3) > 0


def test_a_reference_of_other_rows_is_refused(evidence: Evidence) -> None:
    write_table(REFERENCE, {"logps": [[-1.0]]}, REFERENCE_SCHEMA)
    with pytest.raises(ValueError, match=r"not row for row with .*, got 1 rows for 3"):
        Evidence()


REVISING = Templates(
    Template([[], "prompt", []]), Template([[], "prompt", "completion", [9], "prompt"]), eos=1
)

TRAINED = [
    case for loss in LOSSES.values() if loss.evidence in TRAINABLE for case in cases(loss)[:1]
]
every_trained_loss = pytest.mark.parametrize("case", TRAINED, ids=str)


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return llama()


@pytest.fixture
def real(
    policy: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Evidence, Models]:
    """Six pairs of uneven completions, scored by the policy that will be trained."""
    monkeypatch.chdir(tmp_path)
    COMPLETIONS.parent.mkdir()
    generator = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(3, 259) for _ in range(generator.randint(least, most))]

    pairs = [
        label.Written(
            "train",
            tokens(2, 5),
            [tokens(1, 9) for _ in range(3)],
            label.Pair(number % 2, 1 - number % 2, 0.9),
            label.Ranking([0, 1, 2], [generator.uniform(-0.3, 0.3) for _ in range(3)]),
        )
        for number in range(6)
    ]
    rows = [Row(*row) for pair in pairs for row in pair.rows(REVISING)]
    completions = {
        "prompt": [row.prompt for row in rows],
        "completion": [row.completion for row in rows],
    }
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    for path, schema, rows_of in (
        (PAIRS, PAIRS_SCHEMA, label.Written.pair_row),
        (RANKINGS, RANKINGS_SCHEMA, label.Written.ranking_row),
        (REVISIONS, REVISIONS_SCHEMA, label.Written.revision_row),
    ):
        # Three completions, and both sides of the pair under two revision prompts.
        table = label.columns([rows_of(pair, 7 * i) for i, pair in enumerate(pairs)], schema)
        write_table(path, table, schema)
    with torch.no_grad():
        logps = [logp.tolist() for logp in token_logps(policy, rows)]
    write_table(REFERENCE, {"logps": logps}, REFERENCE_SCHEMA)
    reference = copy.deepcopy(policy).requires_grad_(False)
    return Evidence(), Models(copy.deepcopy(policy), reference, torch.float32)


def run_of(case: Case, sft_weight: float = 0.0) -> Run:
    params = load_params()
    return Run(case.loss, case.hyperparameters, sft_weight, 0, params.train, params.watch, {})


def step_of(
    case: Case,
    evidence: Evidence,
    models: Models,
    *,
    token_budget: int,
    sft_weight: float = 0.0,
    step: int = 0,
) -> tuple[Metrics, Tensor]:
    """One step's metrics, and its gradient."""
    models.policy.zero_grad()
    metrics: Metrics = {}
    rows_of = functools.partial(evidence.rows_of, case.loss.evidence)
    cuts = batches(models.policy, range(6), rows_of, token_budget)
    objective = offline.objective(
        models, evidence, run_of(case, sft_weight), cuts, range(6), step, 0
    )
    for loss, parts in objective:
        loss.backward()
        for name, value in {"loss": loss.item(), **parts}.items():
            metrics[name] = metrics.get(name, 0.0) + value
    gradients = [p.grad.flatten() for p in models.policy.parameters() if p.grad is not None]
    return metrics, torch.cat(gradients)


@every_trained_loss
def test_a_loss_trains_from_pairs_and_starts_where_its_row_says(
    case: Case, real: tuple[Evidence, Models]
) -> None:
    evidence, models = real
    metrics, gradient = step_of(case, evidence, models, token_budget=10_000)
    symbols = evidence.batch(case.loss.evidence, range(6), range(6), models).symbols()
    if case.loss.at_reference:
        declared = formula(case.loss, case.loss.at_reference, symbols, case.hyperparameters)
        assert metrics["loss"] == pytest.approx(declared.mean().item(), rel=1e-5)
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-6


def test_revisions_are_a_pairs_sides_under_the_prompts_that_show_them(
    real: tuple[Evidence, Models],
) -> None:
    evidence, models = real
    moved(models.policy)
    batch = evidence.batch("Revisions", [1, 4], range(6), models)
    for place, pair in enumerate([1, 4]):
        chosen, rejected = (evidence.rows[row] for row in evidence.sides([pair]))
        prompt = chosen.prompt
        for name, shown, written in (
            ("chosen", None, chosen),
            ("rejected", None, rejected),
            ("chosen_given_rejected", rejected, chosen),
            ("rejected_given_rejected", rejected, rejected),
            ("chosen_given_chosen", chosen, chosen),
            ("rejected_given_chosen", chosen, rejected),
        ):
            given = prompt if shown is None else [*prompt, *shown.completion, 9, *prompt]
            row = Row(given, written.completion)
            (logps,) = token_logps(models.policy, [row])
            (reference,) = token_logps(models.reference, [row])
            scored = getattr(batch, name)
            assert scored.logp[place].item() == pytest.approx(logps.sum().item(), abs=1e-4)
            found = scored.reference_logp[place].item()
            assert found == pytest.approx(reference.sum().item(), abs=1e-4)


@pytest.mark.parametrize("case", [case for case in TRAINED if not case.loss.couples], ids=str)
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_cutting_a_step_changes_nothing_where_a_loss_couples_no_examples(
    case: Case, sft_weight: float, real: tuple[Evidence, Models]
) -> None:
    _, models = real
    moved(models.policy)
    options = {"sft_weight": sft_weight, "step": 1}
    whole, expected = step_of(case, *real, token_budget=10_000, **options)
    cut, found = step_of(case, *real, token_budget=30, **options)
    assert cut == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def moved(policy: PreTrainedModel) -> None:
    """Away from the reference, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_sft_term_is_the_mean_nll_of_the_chosen_tokens(real: tuple[Evidence, Models]) -> None:
    evidence, models = real
    (dpo,) = (case for case in TRAINED if case.loss.name == "dpo")
    metrics, gradient = step_of(dpo, evidence, models, token_budget=40, sft_weight=0.5)
    chosen = [evidence.rows[row] for row in evidence.pairs["chosen"]]
    nll = -torch.cat(token_logps(models.policy, chosen)).mean()
    assert metrics["nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(math.log(2) + 0.5 * nll.item(), rel=1e-5)
    models.policy.zero_grad()
    nll.backward()
    alone = torch.cat([p.grad.flatten() for p in models.policy.parameters() if p.grad is not None])
    _, without = step_of(dpo, evidence, models, token_budget=40)
    assert torch.allclose(gradient, without + 0.5 * alone, rtol=1e-4, atol=1e-6)


def test_a_policy_that_is_not_the_reference_is_refused_at_step_0(
    real: tuple[Evidence, Models],
) -> None:
    evidence, models = real
    moved(models.policy)
    for case in TRAINED:
        if case.loss.at_reference:
            with pytest.raises(ValueError, match=r"step 0: .*run `dvc repro --force reference`"):
                step_of(case, evidence, models, token_budget=10_000)


def test_a_loss_that_is_not_a_number_is_refused_at_step_0() -> None:
    (dpo,) = (case for case in TRAINED if case.loss.name == "dpo")
    losses = torch.tensor([math.log(2), math.nan])
    with pytest.raises(ValueError, match=r"step 0: 'dpo' must be log\(2\) = 0\.693147"):
        offline.check_step_0(batch_of("Pairs"), losses, run_of(dpo), torch.float32)


def test_rows_of_a_step_that_diverges_are_named(real: tuple[Evidence, Models]) -> None:
    """Weights as large as float32 holds: the first step is whole, the second one is not."""
    evidence, models = real
    (dpo,) = (case for case in TRAINED if case.loss.name == "dpo")
    run = run_of(dpo)
    run = replace(run, optimiser=run.optimiser.model_copy(update={"batch_size": 2}))
    course = offline.course(models, evidence, run, token_budget=10_000)
    message = f"step 1: loss nan, .*; it was of rows {re.escape(str(course.steps[1]))} of {PAIRS}"
    with pytest.raises(ValueError, match=message), training.naming_the_rows_of(course):
        fit(
            models.policy,
            lambda step: course.share(step, [course.steps[step]]),
            len(course.steps),
            Optimisation(learning_rate=1e38, warmup=0.0),
            log=lambda _: None,
        )


def test_shared_pairs_are_cut_to_the_shorter_side(real: tuple[Evidence, Models]) -> None:
    evidence, models = real
    batch = evidence.batch("SharedPairs", range(6), range(6), models)
    for pair in range(6):
        chosen, rejected = evidence.rows_of("Pairs", pair)
        shorter = min(len(chosen.completion), len(rejected.completion))
        (logps,) = token_logps(models.policy, [chosen])
        assert batch.shared.chosen.logp[pair].item() == pytest.approx(
            logps[:shorter].sum().item(), rel=1e-5
        )
        assert batch.shared.rejected.tokens[pair] == shorter
        assert batch.whole.chosen.tokens[pair] == len(chosen.completion)


def test_weights_are_the_likelihood_of_a_pair_against_the_policys_own_draws(
    real: tuple[Evidence, Models],
) -> None:
    evidence, models = real
    batch = evidence.batch("WeightedPairs", range(6), range(6), models)
    assert not batch.weight.requires_grad
    for pair in range(6):
        product = 1.0
        for row in evidence.rows_of("Pairs", pair):
            prompt, completion = row.prompt, row.completion
            logits = models.policy(torch.tensor([[*prompt, *completion]])).logits[0]
            probabilities = logits.softmax(-1)[len(prompt) - 1 : -1]
            relative = [
                math.log(p[token].item() / (p**2).sum().item())
                for p, token in zip(probabilities, completion, strict=True)
            ]
            product *= math.exp(sum(relative) / len(relative))
        assert batch.weight[pair].item() == pytest.approx(min(product, 1.0), rel=1e-4)


def test_a_pair_likelier_than_the_policys_own_draws_weighs_one(
    real: tuple[Evidence, Models],
) -> None:
    _, models = real
    prompt = [0, 5, 9]
    with torch.no_grad():
        p = models.policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    likeliest, second = p.topk(2).indices.tolist()
    # Their product of p/sum p^2 exceeds 1, at which it is cut.
    assert (p[likeliest] * p[second]).item() > (p**2).sum().item() ** 2
    columns = {"prompt": [prompt, prompt], "completion": [[likeliest], [second]]}
    write_table(COMPLETIONS, columns, COMPLETIONS_SCHEMA)
    pairs = {"split": ["train"], "chosen": [0], "rejected": [1], "preference": [1.0]}
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    write_table(REFERENCE, {"logps": [[-1.0], [-1.0]]}, REFERENCE_SCHEMA)
    assert Evidence().batch("WeightedPairs", [0], [0], models).weight.tolist() == [1.0]


def test_log_ratios_are_the_trained_policys_against_the_stored_reference(
    real: tuple[Evidence, Models],
) -> None:
    evidence, models = real
    moved(models.policy)
    compute = load_params().compute
    found = train.logratios_after(models.policy, evidence, [4, 1], compute)
    for place, pair in enumerate([4, 1]):
        for side in ("chosen", "rejected"):
            row = evidence.pairs[side][pair]
            (logps,) = token_logps(models.policy, [evidence.rows[row]])
            expected = logps.sum().item() - sum(evidence.reference[row])
            assert found[side][place] == pytest.approx(expected, rel=1e-4)
            assert found[f"{side}_reference"][place] == sum(evidence.reference[row])
            assert found[f"{side}_tokens"][place] == len(evidence.rows[row].completion)


def test_sequential_kls_are_those_of_the_next_token_summed(real: tuple[Evidence, Models]) -> None:
    evidence, models = real
    moved(models.policy)
    assert models.reference is not None
    batch = evidence.batch("SequentialPairs", range(6), range(6), models)
    prompt, completion = evidence.rows[0].prompt, evidence.rows[0].completion
    tokens = torch.tensor([[*prompt, *completion]])
    p = models.reference(tokens).logits[0].softmax(-1)[len(prompt) - 1 : -1]
    q = models.policy(tokens).logits[0].softmax(-1)[len(prompt) - 1 : -1]
    expected = (p * (p / q).log()).sum().item()
    assert batch.chosen_kl[0].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    batch.chosen_kl.sum().backward()
    assert all(p.grad is None for p in models.reference.parameters())


def test_mismatched_completions_are_those_of_the_next_pair(real: tuple[Evidence, Models]) -> None:
    evidence, models = real
    batch = evidence.batch("Labelled", [1, 2], [0, 2, 1, 3], models)
    assert batch.desirable.tolist() == [True, True, False, False]
    # In the step, pair 3 comes after pair 1, and pair 1 after pair 2.
    expected = [
        Row(
            evidence.rows_of("Pairs", pair)[side].prompt,
            evidence.rows_of("Pairs", other)[side].completion,
        )
        for side in (0, 1)
        for pair, other in ((1, 3), (2, 1))
    ]
    logps = [logp.sum().item() for logp in token_logps(models.policy, expected)]
    assert batch.mismatched.logp.tolist() == pytest.approx(logps, rel=1e-5)
    assert not batch.mismatched.logp.requires_grad


def test_implicit_rewards_are_the_objectives_and_ties_count_half() -> None:
    def scored(u: list[float]) -> Scored:
        logp = torch.tensor(u)
        return Scored(logp - 8, torch.full_like(logp, -8.0), torch.full((len(u),), 4))

    pairs = Pairs(scored([0.5, 1.0, -1.0]), scored([0.5, -1.0, 1.0]), torch.ones(3))
    squared = {"beta": 0.5, "divergence": DIVERGENCES["squared_log"]}
    metrics = offline.pair_metrics(pairs, run_of(Case(LOSSES["f_dpo"], squared)), 3)
    rewards = [0.5 * u * math.exp(-u) for u in (0.5, 1.0, -1.0)]
    assert metrics["rewards/chosen"] == pytest.approx(sum(rewards) / 3, rel=1e-6)
    assert metrics["logratios/chosen"] == pytest.approx(0.5 / 3, rel=1e-6)
    assert metrics["rewards/accuracies"] == metrics["logratios/accuracies"] == 0.5
    simpo = {"beta": 2.0, "gamma": 0.5}
    metrics = offline.pair_metrics(pairs, run_of(Case(LOSSES["simpo"], simpo)), 3)
    assert metrics["rewards/chosen"] == pytest.approx(2.0 * (0.5 - 24) / 4 / 3, rel=1e-6)


def test_rewards_of_f_dpo_may_rank_pairs_otherwise_than_log_ratios_do() -> None:
    """squared_log's reward falls beyond e: the accuracy of log-ratios would be 1 here."""
    tokens = torch.ones(1, dtype=torch.long)
    zero = torch.zeros(1)
    pairs = Pairs(
        Scored(torch.tensor([3.0]), zero, tokens), Scored(torch.tensor([1.0]), zero, tokens), zero
    )
    squared = {"beta": 0.5, "divergence": DIVERGENCES["squared_log"]}
    metrics = offline.pair_metrics(pairs, run_of(Case(LOSSES["f_dpo"], squared)), 1)
    assert metrics["logratios/accuracies"] == 1.0
    assert metrics["rewards/accuracies"] == 0.0


def test_the_metrics_of_micro_batches_add_up_to_those_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 6, generator=generator)

    def pairs(of: slice) -> Pairs:
        part = numbers[:, of]
        tokens = torch.ones(part.shape[1], dtype=torch.long)
        return Pairs(
            chosen=Scored(part[0], part[1], tokens),
            rejected=Scored(part[2], part[3], tokens),
            preference=torch.ones(part.shape[1]),
        )

    run = run_of(Case(LOSSES["dpo"], {"beta": 0.5, "label_smoothing": 0.0}))
    whole = offline.pair_metrics(pairs(slice(0, 6)), run, 6)
    parts = [offline.pair_metrics(pairs(of), run, 6) for of in (slice(0, 2), slice(2, 6))]
    for name, value in whole.items():
        assert parts[0][name] + parts[1][name] == pytest.approx(value, abs=1e-6)
    assert whole["rewards/margins"] == pytest.approx(
        whole["rewards/chosen"] - whole["rewards/rejected"], abs=1e-6
    )
