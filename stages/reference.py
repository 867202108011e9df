"""Log-probabilities of all labelled completions under SFT: `python -m stages.reference`.

Once for all runs, because the reference is frozen, and once for all time: what the store holds of
the same weights is not scored again.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from tqdm import tqdm

from prefopt.packing import Row
from prefopt.scoring import token_logps
from stages import models
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    SFT,
    TableWriter,
    blocks,
    map_table,
    program,
    stage,
)
from stages.params import Compute, load_params
from stages.rows import Rows
from stages.store import Group, Logps, Store, grouped, key_of

BLOCK = 256  # prompts; a killed pass loses at most so many


def main() -> None:
    params = load_params()
    compute = params.compute
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    with stage(
        "reference",
        inputs=[COMPLETIONS, SFT],
        outputs=[REFERENCE],
        params={"compute": compute.model_dump()},
    ) as workspace:
        completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
        rows = Rows(completions["prompt"], completions["completion"])
        load = functools.cache(lambda: models.load_policy(str(SFT)))
        with (
            Store(key_of(SFT, compute)) as store,
            TableWriter(workspace.partial(REFERENCE), REFERENCE_SCHEMA) as table,
            tqdm(total=len(rows), desc="reference", unit="completion", mininterval=5) as bar,
        ):
            for block in blocks(grouped(rows), BLOCK):
                # Groups come in the order of their rows, and so do their log-probabilities.
                logps = list(chain.from_iterable(records_of(block, store, load, compute)))
                table.extend({"logps": logps})
                bar.update(len(logps))


def records_of(
    groups: Sequence[Group],
    store: Store,
    load: Callable[[], models.PreTrainedModel],
    compute: Compute,
) -> list[Logps]:
    """Records of groups; those that the store lacked are now in it."""
    found = [store.find(group) for group in groups]
    missing = [group for group, logps in zip(groups, found, strict=True) if logps is None]
    scored = [score_group(group.rows, load(), compute) for group in missing]
    store.add(missing, scored)
    fresh = iter(scored)
    return [next(fresh) if logps is None else logps for logps in found]


@torch.no_grad()
def score_group(rows: list[Row], policy: models.PreTrainedModel, compute: Compute) -> Logps:
    """One prompt's completions, in a forward pass of their own."""
    logps = token_logps(policy, rows, compute_dtype=models.DTYPES[compute.dtype])
    return [logp.tolist() for logp in logps]


if __name__ == "__main__":
    program(main)
