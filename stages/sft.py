"""Fine-tune the base on the data's own completions: `python -m stages.sft`.

The result is the reference of every run and the policy that each of them starts from.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prefopt.checkpoints import Metrics
from prefopt.packing import Row, steps_of_rows
from prefopt.scoring import batches, token_logps
from stages import models
from stages.artefacts import (
    CHECKED,
    PROMPTS,
    PROMPTS_SCHEMA,
    SFT,
    SFT_CURVE,
    program,
    read_table,
    stage,
)
from stages.params import load_params
from stages.training import train


def main() -> None:
    params = load_params()
    compute, sft = params.compute, params.sft
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {"base": params.base, "compute": compute.model_dump(), "sft": sft.model_dump()}
    with stage(
        "sft", inputs=[CHECKED, PROMPTS], outputs=[SFT, SFT_CURVE], params=relevant
    ) as workspace:
        prompts = read_table(PROMPTS, PROMPTS_SCHEMA)
        rows = [
            Row(prompt, completion)
            for split, prompt, completion in zip(
                prompts["split"], prompts["tokens"], prompts["gold_tokens"], strict=True
            )
            if split == "train"
        ]
        policy = models.load_policy(params.base)
        models.train_only_top(policy, sft.top_layers)
        steps = steps_of_rows(len(rows), sft.batch_size, sft.num_epochs, compute.seed)

        def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
            num_tokens = sum(len(rows[i].completion) for i in steps[step])
            for batch in batches(policy, steps[step], lambda i: [rows[i]], compute.token_budget):
                logps = token_logps(
                    policy, [rows[i] for i in batch], compute_dtype=models.DTYPES[compute.dtype]
                )
                yield -torch.cat(logps).sum() / num_tokens, {}

        train(
            policy,
            objective,
            len(steps),
            sft,
            workspace,
            model=SFT,
            tokenizer=params.base,
            curve=SFT_CURVE,
            checkpoint_every=compute.checkpoint_every,
        )


if __name__ == "__main__":
    program(main)
