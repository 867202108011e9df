"""Make a round of retraining of params.yaml: `python -m stages.challenge [CHAMPION]`.

The runs become two, the challenger `retrain.run` and the champion, a model that is there: SFT's if
nothing was promoted yet. The data become those that were pulled. All else stays as it is written.
Prints JSON: the challenger's name, and the model that it starts from.
"""

import argparse
import json
import sys
from typing import Any

from stages.artefacts import SFT, program
from stages.existing import CHAMPION
from stages.params import PARAMS, Params, did_you_mean, dump_yaml, load_params
from stages.recipes import overlaid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("champion", nargs="?", default=str(SFT))
    parser.add_argument("--data", required=True)
    asked = parser.parse_args()
    changes = challenge(load_params(), asked.champion, asked.data)
    PARAMS.write_text(overlaid(PARAMS.read_text(), dump_yaml(changes)))
    (challenger, row), _ = changes["runs"].items()
    sys.stdout.write(json.dumps({"run": challenger, "start": row.get("start")}) + "\n")


def challenge(params: Params, champion: str, data: str) -> dict[str, Any]:
    """What of the parameters a round changes.

    Args:
        params: as they are.
        champion: where its model is.
        data: where the pulled data are.

    Raises:
        ValueError: if the two could not be compared by right.
    """
    name, judge = params.retrain.run, params.retrain.gate.judge
    able = [run for run, row in params.runs.items() if "loss" in row and run != CHAMPION]
    if name not in able:
        raise ValueError(
            f"retrain.run: no run that can be the challenger, got '{name}'; able are: "
            f"{', '.join(able)}" + did_you_mean(name, able)
        )
    if judge not in params.evaluation.judges:
        raise ValueError(
            f"retrain.gate.judge: does not judge here, got '{judge}'; evaluation.judges are "
            f"{', '.join(params.evaluation.judges)}"
        )
    if params.data.split_by != "digest":
        raise ValueError(
            "data.split_by: the champion would be examined on prompts that trained it, got "
            f"{params.data.split_by}; set it to digest"
        )
    row = dict(params.runs[name])
    if params.retrain.warm_start and champion != str(SFT):
        row["start"] = champion
    return {"data": {"source": data}, "runs": {name: row, CHAMPION: {"model": champion}}}


if __name__ == "__main__":
    program(main)
