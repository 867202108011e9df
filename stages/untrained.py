"""What the train stage leaves of runs that train nothing: best-of-N, and policies that exist."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.artefacts import (
    COMPLETIONS,
    GENERATIONS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PAIRS,
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
    stage,
    write_table,
)
from stages.evidence import Evidence
from stages.params import Params
from stages.tracking import track

BLOCK = 1024  # pairs whose log-ratios are held at a time
COLUMNS = "step,loss\n"


def leave_untrained(
    name: str,
    params: Params,
    model: Path,
    logratios: Callable[[Evidence, Sequence[int]], dict[str, Any]],
) -> None:
    """A model's weights as they are, a curve without steps, and log-ratios.

    Args:
        name: of the run.
        params: all of them.
        model: its directory.
        logratios: of pairs, as the columns of their table.
    """
    row = params.runs[name]
    with (
        track(name, recipe=params.recipe, params=row, datasets={}) as journal,
        stage(
            f"train@{name}",
            inputs=[COMPLETIONS, PAIRS, REVISIONS, REFERENCE, SFT, model],
            outputs=[model_of(name), curve_of(name), logratios_of(name), generations_of(name)],
            params=row,
        ) as workspace,
    ):
        shutil.copytree(model, workspace.partial(model_of(name)))
        workspace.partial(curve_of(name)).write_text(COLUMNS)
        nothing = {column: [] for column in GENERATIONS_SCHEMA.names}
        write_table(workspace.partial(generations_of(name)), nothing, GENERATIONS_SCHEMA)
        evidence = Evidence()
        with TableWriter(workspace.partial(logratios_of(name)), LOGRATIOS_SCHEMA) as table:
            for block in blocks(evidence.pairs_of("train"), BLOCK):
                table.extend(logratios(evidence, block))
        # By this a later evaluation finds the record of this run.
        journal.write({"logratios": digest(workspace.partial(logratios_of(name)))})


def logratios_of_sft(evidence: Evidence, pairs: Sequence[int]) -> dict[str, Any]:
    """All 0, beside what they rest on."""
    rows = evidence.sides(pairs)
    columns: dict[str, Any] = {}
    for side, of_side in (("chosen", rows[: len(pairs)]), ("rejected", rows[len(pairs) :])):
        reference = [evidence.reference[row] for row in of_side]
        columns[side] = [0.0] * len(pairs)
        columns[f"{side}_reference"] = list(map(sum, reference))
        columns[f"{side}_tokens"] = list(map(len, reference))
    return columns
