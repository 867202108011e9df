"""Sample a policy's completions of the evaluation prompts: `python -m stages.complete RUN`.

`sft` in the place of a run gives the reference's own, which are an opponent in every judgement.
With `revision.rounds`, the policy then revises what it wrote: y_k ~ pi(. | revision prompt of
y_{k-1}), Choi et al. 2024 (arXiv:2406.01660).

A run that is best-of-N draws N and keeps the one of the highest gold reward. Its `logp` is SFT's,
which drew it: how likely the kept one was to be kept cannot be computed.

Log-probabilities under policy and reference go with each sample, given the prompt that it answers:
they are taken at the sampling temperature 1, whatever temperature drew the tokens.
"""

import argparse
from typing import Any

from tqdm import tqdm

from prefopt.packing import Row
from prefopt.scoring import score
from stages import models
from stages.artefacts import (
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    SFT,
    TEMPLATES,
    map_table,
    model_of,
    program,
    rows_of_split,
    samples_of,
    stage,
    write_table,
)
from stages.best_of import best_of, first_best
from stages.params import load_params
from stages.rewards import Text, load_reward
from stages.sampling import Sampling, sampler
from stages.templates import read_templates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute, evaluation = params.compute, params.evaluation
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    best = best_of(params, name)
    num_draws = best.best_of if best else 1
    seed = best.seed if best and best.seed is not None else compute.seed
    relevant = {
        "compute": compute.model_dump(),
        "evaluation": evaluation.model_dump(),
        "rounds": params.revision.rounds,
        "best_of": best
        and {**best.model_dump(), "reward": params.label.reward, "rewards": params.rewards},
    }
    with stage(
        f"complete@{name}",
        inputs=[PROMPTS, TEMPLATES, SFT, model_of(name)],
        outputs=[samples_of(name)],
        params=relevant,
    ) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        numbers = [
            *rows_of_split(prompts, evaluation.split),
            *rows_of_split(prompts, "shifted"),
        ]
        tokenizer = models.load_tokenizer(str(SFT))
        columns: dict[str, list[Any]] = {field: [] for field in SAMPLES_SCHEMA.names}
        rows: list[Row] = []
        prompted = [prompts["tokens"][number] for number in numbers]
        complete = sampler(
            model_of(name),
            Sampling(
                max_new_tokens=params.data.max_completion_tokens,
                temperature=evaluation.temperature,
                eos=models.eos(tokenizer),
                batch_size=params.sample.batch_size,
            ),
            compute,
        )
        for revision in range(params.revision.rounds + 1):
            if revision:
                written = [row.completion for row in rows[-len(numbers) :]]
                templates = read_templates()
                prompted = [
                    templates.revision_of(prompts["tokens"][number], completion)
                    for number, completion in zip(numbers, written, strict=True)
                ]
            title = f"{name}, revision {revision}" if revision else name
            seeds = seeds_of(numbers, seed, revision, of_sft=name == "sft", num_draws=num_draws)
            repeated = [prompt for prompt in prompted for _ in range(num_draws)]
            tokens = complete(repeated, seeds, title=title)
            if best is not None:
                reward = load_reward(params, params.label.reward)
                asked = [prompts["text"][number] for number in numbers for _ in range(num_draws)]
                texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
                rewards = reward(list(map(Text, asked, texts)))
                kept = first_best(rewards, num_draws)
                seeds, tokens = [seeds[i] for i in kept], [tokens[i] for i in kept]
            rows += map(Row, prompted, tokens)
            columns["prompt"] += numbers
            columns["revision"] += [revision] * len(numbers)
            columns["seed"] += seeds
        columns["temperature"] = [evaluation.temperature] * len(rows)
        columns["tokens"] = [row.completion for row in rows]
        columns["text"] = tokenizer.batch_decode(columns["tokens"], skip_special_tokens=True)

        def logps(model: models.PreTrainedModel) -> list[float]:
            with tqdm(total=len(rows), desc="score", unit="completion", mininterval=5) as bar:
                scored = score(
                    model,
                    rows,
                    token_budget=compute.token_budget,
                    compute_dtype=models.DTYPES[compute.dtype],
                    progress=bar.update,
                )
            return [sum(logps) for logps in scored]

        logp = columns["logp"] = logps(models.load_policy(str(model_of(name))))
        is_sft = name == "sft"
        columns["reference_logp"] = logp if is_sft else logps(models.load_policy(str(SFT)))
        write_table(workspace.partial(samples_of(name)), columns, SAMPLES_SCHEMA)


def seeds_of(
    numbers: list[int], seed: int, revision: int, *, of_sft: bool, num_draws: int = 1
) -> list[int]:
    """One a prompt and draw; the SFT policy draws from other random numbers than the runs do.

    So an unchanged policy meets an independent sample and not its own words. A prompt's draws lie
    together.
    """
    stream = 2 * revision + (1 if of_sft else 2)
    return [
        (seed * 1_000_003 + stream + 1000 * draw) * 1_000_003 + number
        for number in numbers
        for draw in range(num_draws)
    ]


if __name__ == "__main__":
    program(main)
