"""Log-probabilities of all labelled completions under SFT: `python -m stages.reference`.

Once for all runs, because the reference is frozen, and once for all time: what the store holds of
the same weights is not scored again.
"""

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
    program,
    read_table,
    stage,
    write_table,
)
from stages.params import Compute, load_params
from stages.store import Group, Logps, Store, grouped, key_of

SHARD = 256  # prompts; a killed pass loses at most so many


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
        completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
        rows = list(map(Row, completions["prompt"], completions["completion"]))
        records = score_what_is_missing(rows, grouped(rows), Store(key_of(SFT, compute)), compute)
        logps: list[list[float]] = [[] for _ in rows]
        for group in grouped(rows):
            for row, found in zip(group.rows, records[group.digest], strict=True):
                logps[row] = found
        write_table(workspace.partial(REFERENCE), {"logps": logps}, REFERENCE_SCHEMA)


def score_what_is_missing(
    rows: list[Row], groups: list[Group], store: Store, compute: Compute
) -> dict[str, Logps]:
    """Records of all groups; those that the store lacked are now in it."""
    records = store.known()
    missing = [group for group in groups if group.digest not in records]
    with tqdm(total=len(groups), desc="reference", unit="prompt", mininterval=5) as bar:
        bar.update(len(groups) - len(missing))
        policy = models.load_policy(str(SFT)) if missing else None
        for start in range(0, len(missing), SHARD):
            shard: dict[str, Logps] = {}
            for group in missing[start : start + SHARD]:
                assert policy is not None
                shard[group.digest] = score_group(
                    [rows[row] for row in group.rows], policy, compute
                )
                bar.update()
            store.add(shard)
            records |= shard
    return records


@torch.no_grad()
def score_group(rows: list[Row], policy: models.PreTrainedModel, compute: Compute) -> Logps:
    """One prompt's completions, in a forward pass of their own."""
    logps = token_logps(policy, rows, compute_dtype=models.DTYPES[compute.dtype])
    return [logp.tolist() for logp in logps]


if __name__ == "__main__":
    program(main)
