"""Train one run on its labels, or on its own samples: `python -m stages.train RUN`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefopt import distributed
from prefopt.scoring import score
from stages import models, offline, onpolicy
from stages.artefacts import (
    CANDIDATES,
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
    logratios_of,
    model_of,
    program,
    stage,
    write_table,
)
from stages.best_of import best_of
from stages.evidence import READS_LIVE_REFERENCE, Evidence, Models, table_of
from stages.existing import existing_policy
from stages.launch import Together
from stages.params import Compute, load_params
from stages.runs import ON_POLICY, bind
from stages.tracking import track
from stages.training import train
from stages.untrained import leave_untrained, logratios_of_sft
from stages.watch import Look, account, author, watch

BLOCK = 1024  # pairs whose log-ratios are held at a time
NUM_AUDITED = 8  # prompts of the reference that are scored again before the first step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute = params.compute
    existing = existing_policy(params, name)
    if best_of(params, name) or existing == str(SFT):
        leave_untrained(name, params, SFT, logratios_of_sft)
        return
    if existing is not None:
        models.set_up(seed=compute.seed, num_threads=compute.num_threads)
        policy = models.load_policy(existing)
        leave_untrained(
            name,
            params,
            Path(existing),
            lambda evidence, pairs: logratios_after(policy, evidence, pairs, compute),
        )
        return
    run = bind(params, name)
    models.set_up(seed=run.seed, num_threads=compute.num_threads)
    relevant: dict[str, Any] = {
        # A training goes on from checkpoints of any number of processes.
        "compute": compute.model_dump(exclude={"num_processes"}),
        "train": run.optimiser.model_dump(),
        "watch": run.watch.model_dump(),
        "max_completion_tokens": params.data.max_completion_tokens,
        "run": params.runs[name],
    }
    tables = [PROMPTS, COMPLETIONS, PAIRS, REVISIONS, table_of(run.loss.evidence)]
    if run.draws is not None:
        tables.append(CANDIDATES)
        relevant |= {
            "sample": params.sample.model_dump(include={"batch_size"}),
            "rewards": params.rewards,
        }
    datasets = [path for path in tables if path.exists()]
    with (
        Together(compute.num_processes),
        # Around the stage, so that a training whose outputs are refused in the end is not FINISHED.
        track(
            name,
            recipe=params.recipe,
            params={
                **compute.model_dump(),
                **run.optimiser.model_dump(),
                **run.watch.model_dump(),
                **run.written,
                "seed": run.seed,
            },
            datasets={path.stem: digest(path) for path in datasets},
        ) as journal,
        stage(
            f"train@{name}",
            inputs=[*tables, REFERENCE, SFT, *([Path(run.start)] if run.start else [])],
            outputs=[model_of(name), curve_of(name), logratios_of(name), generations_of(name)],
            params=relevant,
        ) as workspace,
    ):
        evidence = Evidence()
        sft = models.load_policy(str(SFT))
        policy = models.load_policy(run.start) if run.start else sft
        alive = run.watch.writes or run.loss.evidence in (*READS_LIVE_REFERENCE, *ON_POLICY)
        reference = models.frozen(sft, run.optimiser) if alive else None
        models.make_trainable(policy, run.optimiser, seed=run.seed)
        pair = Models(policy, reference, models.DTYPES[compute.dtype])
        audited = Models(sft, reference, pair.compute_dtype)
        deviation = evidence.audit(audited, NUM_AUDITED, compute.seed)
        journal.write({"audit": f"{NUM_AUDITED} prompts scored again, off by {deviation:.2g} nats"})
        course = (
            onpolicy.course(pair, params, run, name, workspace.directory / "rounds")
            if run.draws
            else offline.course(pair, evidence, run, compute.token_budget)
        )
        look = Look(
            course.validation,
            author(pair, params, run.watch),
            workspace.directory / "looks",
        )
        watched = watch(look, run.watch, len(course.steps))
        policy, history = train(
            policy,
            course,
            run.optimiser,
            workspace,
            token_budget=compute.token_budget,
            model=model_of(name),
            source=run.start or str(SFT),
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
