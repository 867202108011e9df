"""Score every labelled completion under the SFT policy: `python -m stages.reference`.

Once for all runs: the reference is frozen.
"""

from tqdm import tqdm

from prefopt.packing import Row
from prefopt.scoring import score
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
from stages.params import load_params


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
        with tqdm(total=len(rows), desc="reference", unit="completion", mininterval=5) as bar:
            logps = score(
                models.load_policy(str(SFT)),
                rows,
                token_budget=compute.token_budget,
                compute_dtype=models.DTYPES[compute.dtype],
                progress=bar.update,
            )
        write_table(workspace.partial(REFERENCE), {"logps": logps}, REFERENCE_SCHEMA)


if __name__ == "__main__":
    program(main)
