"""Refuse bad parameters and bad models before any expensive work: `python -m stages.check`.

Its output never changes, so passing it again re-runs nothing; failing it stops everything.
"""

from stages import models, sampling
from stages.artefacts import CHECKED, program, stage
from stages.judges import check_judge
from stages.params import load_params
from stages.runs import check_runs


def main() -> None:
    params = load_params()
    runs = check_runs(params)
    sampling.check(params.compute)
    models.check(params.base)
    models.check_trainable(params.base, [params.sft, *(run.optimiser for run in runs)])
    for name in set(params.evaluation.judges) & set(params.judges):
        check_judge(params, name)
    with stage("check", inputs=[], outputs=[CHECKED], params=params.model_dump()) as workspace:
        workspace.partial(CHECKED).write_text("params.yaml and the base model are sound\n")


if __name__ == "__main__":
    program(main)
