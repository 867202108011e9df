"""Fine-tune the base on the data's own completions: `python -m stages.sft`.

The result is the reference of every run and the policy that each of them starts from.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prefopt.checkpoints import Metrics
from prefopt.packing import Steps
from prefopt.scoring import token_logps
from stages import models
from stages.artefacts import (
    CHECKED,
    PROMPTS,
    PROMPTS_SCHEMA,
    SFT,
    SFT_CURVE,
    map_table,
    program,
    rows_of_split,
    stage,
)
from stages.launch import Together
from stages.params import load_params
from stages.rows import Rows
from stages.training import Course, train


def main() -> None:
    params = load_params()
    compute, sft = params.compute, params.sft
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {
        "base": params.base,
        # A training goes on from checkpoints of any number of processes.
        "compute": compute.model_dump(exclude={"num_processes"}),
        "sft": sft.model_dump(),
    }
    with (
        Together(compute.num_processes),
        stage(
            "sft", inputs=[CHECKED, PROMPTS], outputs=[SFT, SFT_CURVE], params=relevant
        ) as workspace,
    ):
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        rows = Rows(prompts["tokens"], prompts["gold_tokens"])
        numbers = rows_of_split(prompts, "train")
        policy = models.load_policy(params.base)
        models.make_trainable(policy, sft, seed=compute.seed)
        steps = Steps(len(numbers), sft.batch_size, sft.num_epochs, compute.seed)

        def objective(step: int, cuts: list[list[int]]) -> Iterator[tuple[Tensor, Metrics]]:
            chosen = {i: rows[numbers[i]] for i in steps[step]}
            num_tokens = sum(len(row.completion) for row in chosen.values())
            for batch in cuts:
                logps = token_logps(
                    policy, [chosen[i] for i in batch], compute_dtype=models.DTYPES[compute.dtype]
                )
                yield -torch.cat(logps).sum() / num_tokens, {}

        train(
            policy,
            Course(
                steps,
                rows_of=lambda _, i: [rows[numbers[i]]],
                share=objective,
                where=lambda step: f"rows {[numbers[i] for i in steps[step]]} of {PROMPTS}",
            ),
            sft,
            workspace,
            token_budget=compute.token_budget,
            model=SFT,
            source=params.base,
            curve=SFT_CURVE,
            checkpoint_every=compute.checkpoint_every,
            compute_dtype=models.DTYPES[compute.dtype],
        )


if __name__ == "__main__":
    program(main)
