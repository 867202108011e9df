"""Train one run on its pairs or rankings: `python -m stages.train RUN`."""

import argparse
import functools
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prefopt import distributed
from prefopt.batches import Rankings
from prefopt.checkpoints import Metrics
from prefopt.loop import Diverged
from prefopt.losses.formulas import implicit_rewards, value
from prefopt.losses.likelihood import nll
from prefopt.packing import Steps
from prefopt.scoring import batches, score
from stages import models
from stages.artefacts import (
    COMPLETIONS,
    GENERATIONS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PAIRS,
    PROMPTS,
    REFERENCE,
    REVISIONS,
    SFT,
    TableWriter,
    blocks,
    curve_of,
    digest,
    generations_of,
    is_first,
    logratios_of,
    model_of,
    program,
    stage,
    write_table,
)
from stages.evidence import READS_LIVE_REFERENCE, Evidence, Models, pairs_within, table_of
from stages.launch import Together
from stages.params import Compute, load_params
from stages.runs import Run, bind
from stages.tracking import track
from stages.training import train
from stages.watch import Look, account, author, watch

BLOCK = 1024  # pairs whose log-ratios are held at a time
NUM_AUDITED = 8  # prompts of the reference that are scored again before the first step

# Policy and reference are scored in different micro-batches, whose sums round differently.
STEP_0_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute = params.compute
    run = bind(params, name)
    models.set_up(seed=run.seed, num_threads=compute.num_threads)
    relevant = {
        # A training goes on from checkpoints of any number of processes.
        "compute": compute.model_dump(exclude={"num_processes"}),
        "train": run.optimiser.model_dump(),
        "watch": run.watch.model_dump(),
        "max_completion_tokens": params.data.max_completion_tokens,
        "run": params.runs[name],
    }
    tables = [PROMPTS, COMPLETIONS, PAIRS, REVISIONS, table_of(run.loss.evidence)]
    datasets = [path for path in tables if path.exists()]
    with (
        Together(compute.num_processes),
        # Around the stage, so that a training whose outputs are refused in the end is not FINISHED.
        track(
            name,
            recipe=params.recipe,
            params={
                **run.optimiser.model_dump(),
                **run.watch.model_dump(),
                **run.written,
                **compute.model_dump(),
            },
            datasets={path.stem: digest(path) for path in datasets},
        ) as journal,
        stage(
            f"train@{name}",
            inputs=[*tables, REFERENCE, SFT],
            outputs=[model_of(name), curve_of(name), logratios_of(name), generations_of(name)],
            params=relevant,
        ) as workspace,
    ):
        evidence = Evidence()
        policy = models.load_policy(str(SFT))
        alive = run.watch.writes or run.loss.evidence in READS_LIVE_REFERENCE
        reference = models.frozen(policy, run.optimiser) if alive else None
        models.make_trainable(policy, run.optimiser, seed=run.seed)
        pair = Models(policy, reference, models.DTYPES[compute.dtype])
        deviation = evidence.audit(pair, NUM_AUDITED, compute.seed)
        journal.write({"audit": f"{NUM_AUDITED} prompts scored again, off by {deviation:.2g} nats"})
        steps = steps_of(evidence, run)
        look = Look(
            functools.partial(on_validation_pairs, pair, evidence, run, compute.token_budget),
            author(pair, params, run.watch),
            workspace.directory / "looks",
        )
        watched = watch(look, run.watch, len(steps))
        tokens_before = TokensBefore(evidence, run.loss.evidence, steps)
        with naming_the_rows_of(steps, table_of(run.loss.evidence)):
            policy, history = train(
                policy,
                lambda step, cuts: objective(
                    pair,
                    evidence,
                    run,
                    cuts,
                    steps[step],
                    step,
                    tokens_before(step) if is_first() else 0,
                ),
                steps,
                run.optimiser,
                workspace,
                rows_of=functools.partial(evidence.rows_of, run.loss.evidence),
                token_budget=compute.token_budget,
                couples=run.loss.couples,
                model=model_of(name),
                source=str(SFT),
                curve=curve_of(name),
                checkpoint_every=compute.checkpoint_every,
                compute_dtype=pair.compute_dtype,
                adapted=SFT,
                journal=journal,
                watch=watched,
            )
        if watched.selection is not None:
            kept = account(watched, history, run.watch, name)
            journal.write({"kept": kept})
            sys.stderr.write(f"{name}: {kept}\n")
        generations = look.generations(watched.looks(history))
        write_table(workspace.partial(generations_of(name)), generations, GENERATIONS_SCHEMA)
        pairs = evidence.pairs_of("train")
        with (
            TableWriter(workspace.partial(logratios_of(name)), LOGRATIOS_SCHEMA) as table,
            tqdm(total=len(pairs), desc="log-ratios", unit="pair", mininterval=5) as bar,
        ):
            for block in blocks(pairs, BLOCK):
                table.extend(logratios_after(policy, evidence, block, compute))
                bar.update(len(block))
        # By this a later evaluation finds the record of this training.
        journal.write({"logratios": digest(workspace.partial(logratios_of(name)))})


def steps_of(evidence: Evidence, run: Run) -> Steps:
    """The training pairs or rankings of every optimiser step; they come before all others.

    Raises:
        ValueError: if the run selects by validation pairs or rankings, and there are none.
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


@contextmanager
def naming_the_rows_of(steps: Steps, table: Path) -> Generator[None, None, None]:
    """Tell of a step that diverged which rows of its table it was of."""
    try:
        yield
    except Diverged as error:
        raise ValueError(f"{error}; it was of rows {steps[error.step]} of {table}") from error


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
        if step == 0:
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
        values |= ranked(
            value(run.loss, run.loss.reward, batch.symbols(), run.hyperparameters), batch.rewards
        )
    return {name: x.sum().item() / step_size for name, x in values.items()}


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


def logratios_after(
    policy: models.PreTrainedModel, evidence: Evidence, pairs: Sequence[int], compute: Compute
) -> dict[str, Any]:
    """Log-ratios of both sides of pairs under the trained policy in nats, and what they rest on."""
    rows = evidence.sides(pairs)
    used = sorted(set(rows))
    # Neighbours have prompts in common, so each process takes a run of them.
    places = [len(used) * rank // distributed.size() for rank in range(distributed.size() + 1)]
    mine = used[places[distributed.rank()] : places[distributed.rank() + 1]]
    logps = score(
        policy,
        [evidence.rows[row] for row in mine],
        token_budget=compute.token_budget,
        compute_dtype=models.DTYPES[compute.dtype],
        progress=lambda _: None,
    )
    found = {row: sum(logp) for row, logp in zip(mine, logps, strict=True)}
    after = distributed.summed(dict.fromkeys(used, 0.0) | found)
    columns: dict[str, Any] = {}
    for side, of_side in (("chosen", rows[: len(pairs)]), ("rejected", rows[len(pairs) :])):
        before = [sum(evidence.reference[row]) for row in of_side]
        columns[side] = [after[row] - logp for row, logp in zip(of_side, before, strict=True)]
        columns[f"{side}_reference"] = before
        columns[f"{side}_tokens"] = [len(evidence.reference[row]) for row in of_side]
    return columns


if __name__ == "__main__":
    program(main)
