"""Train one run on its pairs: `python -m stages.train RUN`."""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prefopt.batches import Pairs, Scored
from prefopt.loop import Metrics
from prefopt.packing import micro_batches, steps_of_rows
from prefopt.scoring import Row, score, token_logps
from stages import models
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    REFERENCE,
    REFERENCE_SCHEMA,
    SFT,
    curve_of,
    digest,
    logratios_of,
    model_of,
    program,
    read_table,
    stage,
    write_table,
)
from stages.params import Compute, load_params
from stages.runs import Run, bind
from stages.tracking import track
from stages.training import train

# Policy and reference are scored in different micro-batches, whose sums round differently.
STEP_0_TOLERANCE = 1e-3


class Evidence:
    """Completions with their reference, and the pairs that point at them."""

    def __init__(self) -> None:
        completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
        self.rows = list(map(Row, completions["prompt"], completions["completion"]))
        self.pairs = read_table(PAIRS, PAIRS_SCHEMA)
        self.reference = [sum(logps) for logps in read_table(REFERENCE, REFERENCE_SCHEMA)["logps"]]
        if len(self.reference) != len(self.rows):
            raise ValueError(
                f"{REFERENCE}: not row for row with {COMPLETIONS}, got {len(self.reference)} rows "
                f"for {len(self.rows)}; run `dvc repro reference`"
            )
        # What a pair takes of a micro-batch, both sides padded to the longer one.
        self.lengths = [
            2 * max(len(self.rows[chosen]), len(self.rows[rejected]))
            for chosen, rejected in zip(self.pairs["chosen"], self.pairs["rejected"], strict=True)
        ]

    def num_tokens(self, pairs: list[int]) -> int:
        """Tokens of both sides of the pairs, prompts included, padding excluded."""
        sides = [self.pairs[side][pair] for side in ("chosen", "rejected") for pair in pairs]
        return sum(len(self.rows[row]) for row in sides)

    def assemble(self, pairs: list[int], logps: list[Tensor]) -> Pairs:
        """The batch of `pairs`, from the log-probabilities of their chosen, then rejected rows."""

        def scored(column: str, logps: list[Tensor]) -> Scored:
            rows = [self.pairs[column][pair] for pair in pairs]
            return Scored(
                logp=torch.stack([logp.sum() for logp in logps]),
                reference_logp=torch.tensor(
                    [self.reference[row] for row in rows], device=logps[0].device
                ),
                tokens=torch.tensor([len(self.rows[row].completion) for row in rows]),
            )

        half = len(pairs)
        return Pairs(
            chosen=scored("chosen", logps[:half]),
            rejected=scored("rejected", logps[half:]),
            preference=torch.tensor([self.pairs["preference"][pair] for pair in pairs]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute = params.compute
    run = bind(params, name)
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {
        "compute": compute.model_dump(),
        "train": run.optimiser.model_dump(),
        "run": params.runs[name],
    }
    datasets = [path for path in (PROMPTS, COMPLETIONS, PAIRS) if path.exists()]
    with (
        # Outermost, so that a training whose outputs are refused in the end is no FINISHED one.
        track(
            name,
            recipe=params.recipe,
            params={**run.optimiser.model_dump(), **run.hyperparameters, **compute.model_dump()},
            datasets={path.stem: digest(path) for path in datasets},
        ) as journal,
        stage(
            f"train@{name}",
            inputs=[PROMPTS, COMPLETIONS, PAIRS, REFERENCE, SFT],
            outputs=[model_of(name), curve_of(name), logratios_of(name)],
            params=relevant,
        ) as workspace,
    ):
        evidence = Evidence()
        policy = models.load_policy(str(SFT))
        models.train_only_top(policy, run.optimiser.top_layers)
        steps = steps_of_rows(
            len(evidence.pairs["chosen"]),
            run.optimiser.batch_size,
            run.optimiser.num_epochs,
            compute.seed,
        )
        tokens_before = [0, *itertools.accumulate(map(evidence.num_tokens, steps))]
        train(
            policy,
            lambda step: objective(
                policy, evidence, run, compute, steps[step], step, tokens_before[step]
            ),
            len(steps),
            run.optimiser,
            workspace,
            model=model_of(name),
            tokenizer=str(SFT),
            curve=curve_of(name),
            checkpoint_every=compute.checkpoint_every,
            journal=journal,
        )
        logratios = logratios_after(policy, evidence, compute)
        write_table(workspace.partial(logratios_of(name)), logratios, LOGRATIOS_SCHEMA)
        # By this a later evaluation finds the record of this training.
        journal.write({"logratios": digest(workspace.partial(logratios_of(name)))})


def objective(
    policy: models.PreTrainedModel,
    evidence: Evidence,
    run: Run,
    compute: Compute,
    pairs: list[int],
    step: int,
    tokens_before: int,
) -> Iterator[tuple[Tensor, Metrics]]:
    """The micro-batches of one step; losses and metrics are shares of the step's mean.

    `num_tokens` counts from the training's start, as TRL's does: `tokens_before` before this step.
    """
    table, rows = evidence.pairs, evidence.rows
    for batch in micro_batches(pairs, evidence.lengths, compute.token_budget):
        sides = [table[side][pair] for side in ("chosen", "rejected") for pair in batch]
        logps = token_logps(
            policy, [rows[row] for row in sides], compute_dtype=models.DTYPES[compute.dtype]
        )
        evidence_batch = evidence.assemble(batch, logps)
        losses = run.loss(evidence_batch)
        if step == 0:
            check_step_0(losses.detach(), run)
        metrics = pair_metrics(evidence_batch, run.beta, len(pairs))
        metrics["num_tokens"] = tokens_before + evidence.num_tokens(batch)
        tokens_before = 0
        yield losses.sum() / len(pairs), metrics


def check_step_0(losses: Tensor, run: Run) -> None:
    """Before the first update policy = reference, where every loss has a value known beforehand.

    Raises:
        ValueError: if it has another: the policy is not the reference that was scored.
    """
    worst = (losses - run.at_reference).abs().max().item()
    if not worst <= STEP_0_TOLERANCE * max(1.0, abs(run.at_reference)):
        raise ValueError(
            f"step 0: the loss must be {run.at_reference:.6f} where the policy is the reference, "
            f"got {losses.tolist()}; {REFERENCE} was made by other weights, tokens or dtype than "
            f"{SFT}: run `dvc repro --force reference`"
        )


@torch.no_grad()
def pair_metrics(pairs: Pairs, beta: float, step_size: int) -> dict[str, Any]:
    """TRL's names; each is this micro-batch's share of the mean over the step's pairs."""
    chosen, rejected = beta * pairs.chosen.logratio, beta * pairs.rejected.logratio
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen.logp,
        "logps/rejected": pairs.rejected.logp,
    }
    return {name: value.sum().item() / step_size for name, value in values.items()}


def logratios_after(
    policy: models.PreTrainedModel, evidence: Evidence, compute: Compute
) -> dict[str, list[float]]:
    """Log-ratios of both sides of every pair under the trained policy, in nats."""
    used = sorted({*evidence.pairs["chosen"], *evidence.pairs["rejected"]})
    with tqdm(total=len(used), desc="log-ratios", unit="completion", mininterval=5) as bar:
        logps = score(
            policy,
            [evidence.rows[row] for row in used],
            token_budget=compute.token_budget,
            compute_dtype=models.DTYPES[compute.dtype],
            progress=bar.update,
        )
    logratio = {
        row: sum(logp) - evidence.reference[row] for row, logp in zip(used, logps, strict=True)
    }
    return {
        side: [logratio[row] for row in evidence.pairs[side]] for side in ("chosen", "rejected")
    }


if __name__ == "__main__":
    program(main)
