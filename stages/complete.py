"""Sample a policy's completions of the evaluation prompts: `python -m stages.complete RUN`.

`sft` in the place of a run gives the reference's own, which are an opponent in every judgement.
With `revision.rounds`, the policy then revises what it wrote: y_k ~ pi(. | revision prompt of
y_{k-1}), Choi et al. 2024 (arXiv:2406.01660).

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
from stages.params import load_params
from stages.sampling import Sampling, sampler
from stages.templates import read_templates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute, evaluation = params.compute, params.evaluation
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {
        "compute": compute.model_dump(),
        "evaluation": evaluation.model_dump(),
        "rounds": params.revision.rounds,
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
            seeds = seeds_of(numbers, compute.seed, revision, of_sft=name == "sft")
            title = f"{name}, revision {revision}" if revision else name
            rows += map(Row, prompted, complete(prompted, seeds, title=title))
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


def seeds_of(numbers: list[int], seed: int, revision: int, *, of_sft: bool) -> list[int]:
    """One a prompt; the SFT policy draws from other random numbers than the runs do.

    So an unchanged policy meets an independent sample and not its own words.
    """
    stream = 2 * revision + (1 if of_sft else 2)
    return [(seed * 1_000_003 + stream) * 1_000_003 + number for number in numbers]


if __name__ == "__main__":
    program(main)
