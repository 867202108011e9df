"""Sample a policy's completions of the evaluation prompts: `python -m stages.complete RUN`.

`sft` in the place of a run gives the reference's own, which are an opponent in every judgement.
Log-probabilities under policy and reference go with each sample: they are taken at the sampling
temperature 1, whatever temperature drew the tokens.
"""

import argparse

from tqdm import tqdm

from prefopt.generation import sample
from prefopt.packing import Row
from prefopt.scoring import score
from stages import models
from stages.artefacts import (
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    SFT,
    map_table,
    model_of,
    program,
    rows_of_split,
    samples_of,
    stage,
    write_table,
)
from stages.params import load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    compute, evaluation = params.compute, params.evaluation
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {"compute": compute.model_dump(), "evaluation": evaluation.model_dump()}
    with stage(
        f"complete@{name}",
        inputs=[PROMPTS, SFT, model_of(name)],
        outputs=[samples_of(name)],
        params=relevant,
    ) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        numbers = rows_of_split(prompts, evaluation.split)
        # The SFT policy draws from other random numbers than the runs, so that an unchanged
        # policy meets an independent sample and not its own words.
        stream = 1 if name == "sft" else 2
        seeds = [(compute.seed * 1_000_003 + stream) * 1_000_003 + number for number in numbers]
        tokenizer = models.load_tokenizer(str(SFT))
        policy = models.load_policy(str(model_of(name)))
        with tqdm(total=len(numbers), desc=name, unit="completion", mininterval=5) as bar:
            tokens = sample(
                policy,
                [prompts["tokens"][number] for number in numbers],
                seeds,
                max_new_tokens=params.data.max_completion_tokens,
                temperature=evaluation.temperature,
                eos=models.eos(tokenizer),
                batch_size=params.sample.batch_size,
                progress=bar.update,
            )
        rows = [
            Row(prompts["tokens"][number], completion)
            for number, completion in zip(numbers, tokens, strict=True)
        ]

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

        logp = logps(policy)
        columns = {
            "prompt": numbers,
            "seed": seeds,
            "temperature": [evaluation.temperature] * len(rows),
            "text": tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
            "logp": logp,
            "reference_logp": logp if name == "sft" else logps(models.load_policy(str(SFT))),
        }
        write_table(workspace.partial(samples_of(name)), columns, SAMPLES_SCHEMA)


if __name__ == "__main__":
    program(main)
