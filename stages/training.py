"""What SFT and every run share: the loop, with its curve, checkpoints and the model it leaves."""

from pathlib import Path

from prefopt.checkpoints import Checkpoints
from prefopt.loop import Objective, Optimisation, fit
from stages import models
from stages.artefacts import Workspace
from stages.params import Optimiser
from stages.tracking import Curve, Journal


def train(
    policy: models.PreTrainedModel,
    objective: Objective,
    num_steps: int,
    optimiser: Optimiser,
    workspace: Workspace,
    *,
    model: Path,
    tokenizer: str,
    curve: Path,
    checkpoint_every: int,
    journal: Journal | None = None,
) -> None:
    """Fit the policy and write its model directory and its curve into the workspace."""
    checkpoints = Checkpoints(workspace.checkpoints, checkpoint_every)
    with Curve(workspace.partial(curve), workspace.name, num_steps, journal) as drawn:
        fit(
            policy,
            objective,
            num_steps,
            optimisation(optimiser),
            log=drawn.log,
            checkpoints=checkpoints,
        )
    models.save(policy, models.load_tokenizer(tokenizer), workspace.partial(model))


def optimisation(optimiser: Optimiser) -> Optimisation:
    """What the loop reads of a section; epochs, batches and layers are the stage's business."""
    return Optimisation(
        learning_rate=optimiser.learning_rate,
        schedule=optimiser.schedule,
        warmup=optimiser.warmup,
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.max_grad_norm,
    )
