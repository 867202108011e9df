"""Refuse bad parameters and bad models before any expensive work: `python -m stages.check`.

Its output never changes, so passing it again re-runs nothing; failing it stops everything.
"""

from pathlib import Path

from stages import models, sampling
from stages.artefacts import CHECKED, SFT, program, stage
from stages.existing import existing_policy
from stages.judges import check_judge
from stages.params import Params, load_params
from stages.reward_models import check_base
from stages.rewards import check_reward
from stages.runs import check_runs


def main() -> None:
    params = load_params()
    runs = check_runs(params)
    sampling.check(params.compute)
    models.check(params.base)
    models.check_trainable(params.base, [params.sft, *(run.optimiser for run in runs)])
    there = {*(existing_policy(params, name) for name in params.runs), *(run.start for run in runs)}
    for model in there - {None, str(SFT)}:
        models.check(str(model))
    for name in params.rewards:
        check_reward(params, name)
    for name in params.reward_models:
        check_base(f"reward_models.{name}.base", params.reward_model(name).base)
    for name in set(params.evaluation.judges) & set(params.judges):
        check_judge(params, name)
    check_files(params)
    with stage("check", inputs=[], outputs=[CHECKED], params=params.model_dump()) as workspace:
        workspace.partial(CHECKED).write_text("params.yaml and the base model are sound\n")


def check_files(params: Params) -> None:
    """Refuse files that are not there: of them DVC would say no more than the path.

    What `dvc add` tracks need not be there yet: DVC brings it to the stages that read it.

    Raises:
        ValueError: if one is missing.
    """
    named = {
        "data.source": params.data.source,
        "data.shifted": params.data.shifted,
        "revision.template": params.revision.template,
    }
    for key, path in named.items():
        if not Path(path).is_file() and not Path(f"{path}.dvc").is_file():
            raise ValueError(f"{key}: no such file, got '{path}'; give the path of one that is")


if __name__ == "__main__":
    program(main)
