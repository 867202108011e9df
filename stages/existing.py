"""A policy that exists as a run: `{model: data/models/champion}`. Nothing is trained.

So it writes, is judged and is compared on the same prompts as the runs that are trained.
"""

from stages.params import ExistingPolicy, Params, checked

CHAMPION = "champion"  # the run that a retraining's challenger is compared with


def existing_policy(params: Params, run: str) -> str | None:
    """Where the run's model lies; None if the run is of another kind, or SFT itself.

    Raises:
        ValueError: if it names a model and anything else beside it, or one that DVC does not watch.
    """
    row = params.runs.get(run, {})
    return checked(ExistingPolicy, row, f"runs.{run}").model if "model" in row else None
