"""What the train stage leaves of best-of-N, which trains nothing."""

import shutil

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


def leave_untrained(name: str, params: Params) -> None:
    """SFT's weights as they are, a curve without steps, and log-ratios of 0."""
    row = params.runs[name]
    with (
        track(name, recipe=params.recipe, params=row, datasets={}) as journal,
        stage(
            f"train@{name}",
            inputs=[COMPLETIONS, PAIRS, REVISIONS, REFERENCE, SFT],
            outputs=[model_of(name), curve_of(name), logratios_of(name), generations_of(name)],
            params=row,
        ) as workspace,
    ):
        shutil.copytree(SFT, workspace.partial(model_of(name)))
        workspace.partial(curve_of(name)).write_text(COLUMNS)
        nothing = {column: [] for column in GENERATIONS_SCHEMA.names}
        write_table(workspace.partial(generations_of(name)), nothing, GENERATIONS_SCHEMA)
        evidence = Evidence()
        with TableWriter(workspace.partial(logratios_of(name)), LOGRATIOS_SCHEMA) as table:
            for block in blocks(evidence.pairs_of("train"), BLOCK):
                rows = evidence.sides(block)
                columns: dict[str, list[float]] = {}
                sides = {"chosen": rows[: len(block)], "rejected": rows[len(block) :]}
                for side, of_side in sides.items():
                    reference = [evidence.reference[row] for row in of_side]
                    columns[side] = [0.0] * len(block)
                    columns[f"{side}_reference"] = list(map(sum, reference))
                    columns[f"{side}_tokens"] = list(map(len, reference))
                table.extend(columns)
        # By this a later evaluation finds the record of this run.
        journal.write({"logratios": digest(workspace.partial(logratios_of(name)))})
