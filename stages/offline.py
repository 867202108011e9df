"""Steps of pairs or rankings: what a run on labels trains on, and what its loss makes of them."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.batches import Rankings
from prefopt.checkpoints import Metrics
from prefopt.losses.formulas import implicit_rewards, value
from prefopt.losses.likelihood import nll
from prefopt.packing import Steps
from prefopt.scoring import batches
from stages.artefacts import REFERENCE, SFT, is_first
from stages.evidence import Evidence, Models, pairs_within, table_of
from stages.runs import Run
from stages.training import Course

# Policy and reference are scored in different micro-batches, whose sums round differently.
STEP_0_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def course(pair: Models, evidence: Evidence, run: Run, token_budget: int) -> Course:
    """All training pairs, or rankings, in steps that the run's seed shuffles.

    Raises:
        ValueError: if the run selects by those of the validation split, and there are none.
    """
    steps = steps_of(evidence, run)
    kind = run.loss.evidence
    tokens_before = TokensBefore(evidence, kind, steps)
    return Course(
        steps,
        rows_of=lambda _, example: evidence.rows_of(kind, example),
        share=lambda step, cuts: objective(
            pair, evidence, run, cuts, steps[step], step, tokens_before(step) if is_first() else 0
        ),
        where=lambda step: f"rows {steps[step]} of {table_of(kind)}",
        validation=functools.partial(on_validation_pairs, pair, evidence, run, token_budget),
        couples=run.loss.couples,
    )


def steps_of(evidence: Evidence, run: Run) -> Steps:
    """The training pairs or rankings of every optimiser step; they come before all others.

    Raises:
        ValueError: if the run selects by those of the validation split, and there are none.
    """
    kind = run.loss.evidence
    if run.watch.select != "last" and not evidence.examples_of(kind, "validation"):
        raise ValueError(
            f"watch.select: '{run.watch.select}' reads validation pairs, got none in "
            f"{table_of(kind)}; give the data's validation split pairs that differ, or set select "
            "to last"
        )
    examples = evidence.examples_of(kind, "train")
    assert examples.start == 0
    return Steps(len(examples), run.optimiser.batch_size, run.optimiser.num_epochs, run.seed)


class TokensBefore:
    """Tokens of all steps before one. Steps are asked for in their order, so each counts once."""

    def __init__(self, evidence: Evidence, kind: str, steps: Steps) -> None:
        self._counts = (evidence.num_tokens(kind, step) for step in steps)
        self._step = self._tokens = 0

    def __call__(self, step: int) -> int:
        while self._step < step:
            self._tokens += next(self._counts)
            self._step += 1
        assert self._step == step
        return self._tokens


def objective(
    pair: Models,
    evidence: Evidence,
    run: Run,
    cuts: Iterable[Sequence[int]],
    pairs: Sequence[int],
    step: int,
    tokens_before: int,
) -> Iterator[tuple[Tensor, Metrics]]:
    """Micro-batches of a step's pairs or rankings; losses and metrics are shares of its mean.

    The chosen completions' NLL has the step's own normaliser, its chosen tokens. `num_tokens`
    counts from the training's start, as TRL's does: `tokens_before` before this step.
    """
    kind = run.loss.evidence
    chosen_tokens = evidence.num_chosen_tokens(pairs) if run.sft_weight else 0
    for cut in cuts:
        batch = evidence.batch(kind, cut, pairs, pair)
        losses = run.loss.function(batch, **run.hyperparameters)
        if step == 0 and run.start is None:
            check_step_0(batch, losses.detach(), run, pair.compute_dtype)
        # An unpaired loss has two examples a pair.
        loss = losses.sum() / (len(pairs) * (len(losses) // len(cut)))
        metrics = pair_metrics(batch, run, len(pairs))
        if run.sft_weight:
            likelihood = nll(pairs_within(batch).chosen, chosen_tokens)
            metrics["nll"] = likelihood.item()
            loss = loss + run.sft_weight * likelihood
        metrics["num_tokens"] = tokens_before + evidence.num_tokens(kind, cut)
        tokens_before = 0
        yield loss, metrics


def on_validation_pairs(
    pair: Models, evidence: Evidence, run: Run, token_budget: int, step: int
) -> Iterator[tuple[Tensor, Metrics]]:
    """What the objective makes of all validation pairs or rankings as one step, after `step`."""
    pairs = evidence.examples_of(run.loss.evidence, "validation")
    rows_of = functools.partial(evidence.rows_of, run.loss.evidence)
    cuts = batches(pair.policy, pairs, rows_of, token_budget)
    for loss, metrics in objective(pair, evidence, run, cuts, pairs, step + 1, 0):
        del metrics["num_tokens"]
        yield loss, metrics


def check_step_0(batch: Any, losses: Tensor, run: Run, compute_dtype: torch.dtype) -> None:
    """Before the first update the policy is the reference, where most losses declare their value.

    Raises:
        ValueError: if it has another: the policy is not the reference that was scored.
    """
    if not run.loss.at_reference:
        return
    at_reference = value(run.loss, run.loss.at_reference, batch.symbols(), run.hyperparameters)
    declared = at_reference.detach().expand_as(losses)
    deviation = ((losses - declared).abs() / declared.abs().clamp(min=1)).max().item()
    if not deviation <= STEP_0_TOLERANCE[compute_dtype]:
        raise ValueError(
            f"step 0: '{run.loss.name}' must be {run.loss.at_reference} = "
            f"{declared.mean().item():.6f} where the policy is the reference, got "
            f"{losses.tolist()}; {REFERENCE} was made by other weights, tokens or dtype than "
            f"{SFT}: run `dvc repro --force reference`"
        )


@torch.no_grad()
def pair_metrics(batch: Any, run: Run, step_size: int) -> dict[str, Any]:
    """This micro-batch's share of means over the step's pairs; ties count half.

    `rewards/*` are the objective's own implicit rewards (`LOSSES[name].reward`: beta times the
    divergence's score for f-DPO, beta times log-probability per token for SimPO); `logratios/*` are
    plain log-ratios in nats, comparable between objectives. Of a ranking they are those of the best
    and of the worst by reward; `rankings/*` are of all K.
    """
    pairs = pairs_within(batch)
    symbols = (pairs if run.loss.evidence in ("Labelled", "Rankings") else batch).symbols()
    rewards = implicit_rewards(run.loss, symbols, run.hyperparameters)
    values = {
        **compared("rewards", *rewards),
        **compared("logratios", pairs.chosen.logratio, pairs.rejected.logratio),
        "logps/chosen": pairs.chosen.logp,
        "logps/rejected": pairs.rejected.logp,
    }
    if isinstance(batch, Rankings):
        implicit = value(run.loss, run.loss.reward, batch.symbols(), run.hyperparameters)
        values |= ranked(implicit, batch.rewards)
    return {name: share.sum().item() / step_size for name, share in values.items()}


def compared(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/chosen": chosen,
        f"{name}/rejected": rejected,
        f"{name}/accuracies": 0.5 * (torch.sign(chosen - rejected) + 1),
        f"{name}/margins": chosen - rejected,
    }


def ranked(implicit: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """How K completions stand by the policy's implicit rewards, against their rewards.

    Args:
        implicit: of each ranking's K completions.
        rewards: of the same.

    Returns:
        Of each ranking `correlation`, Kendall's tau over the pairs whose rewards differ, an
        implicit tie counting 0, and 0 where none differ; and `mass_on_best`, the share of
        softmax(implicit) that falls on the completions of the highest reward.
    """
    by_reward = torch.sign(rewards[:, :, None] - rewards[:, None, :])
    by_policy = torch.sign(implicit[:, :, None] - implicit[:, None, :])
    agreement = (by_reward * by_policy).sum((1, 2)) / by_reward.abs().sum((1, 2)).clamp(min=1)
    best = rewards == rewards.amax(-1, keepdim=True)
    return {
        "rankings/correlation": agreement,
        "rankings/mass_on_best": (implicit.softmax(-1) * best).sum(-1),
    }
