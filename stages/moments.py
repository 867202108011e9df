"""What fresh samples of a run say of its target: `python -m stages.moments RUN [--samples N]`.

Of a run that trains on samples of its own: its moments, or the reward of a tilt, and its KL to the
reference, with standard errors, and beside them what the target has, all as JSON. The KL is summed
over the vocabulary at each sampled token, which says more than as many samples' log-ratios. Samples
are as many of each prompt as of any other, of the prompts that the target was fitted on, and by
seeds that no other stage draws with. Nothing else reads it: it is a measurement, for a recipe's
results.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from prefopt.packing import Row
from prefopt.scoring import batches, token_logps_and_kls
from stages import models
from stages.artefacts import PROMPTS, PROMPTS_SCHEMA, SFT, map_table, model_of, program
from stages.onpolicy import target_of
from stages.params import Params, load_params
from stages.rewards import Text
from stages.runs import bind
from stages.sampling import Sampling, sampler

FIRST_SEED = 1 << 61


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=2000, help="at least; 2000")
    arguments = parser.parse_args()
    found = measured(load_params(), arguments.run, arguments.samples)
    sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")


def measured(params: Params, name: str, least: int) -> dict[str, Any]:
    """The facts, of at least so many samples.

    Raises:
        ValueError: if the run has no target, is not trained yet, or `least` is none.
    """
    run = bind(params, name)
    if run.draws is None:
        raise ValueError(
            f"runs.{name}: learns from no samples of its own, got loss '{run.loss.name}'; name a "
            "run of f_dpg, rloo or ppo"
        )
    if least < 1:
        raise ValueError(f"--samples: none, got {least}; ask for one or more")
    if not model_of(name).exists():
        raise ValueError(f"{model_of(name)}: no such model; run `dvc repro train@{name}`")
    compute = params.compute
    models.set_up(seed=run.seed, num_threads=compute.num_threads)
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    target = target_of(run, params, name, prompts)
    known = sorted(target.log_z)
    each = -(-least // len(known))
    numbers = [number for number in known for _ in range(each)]
    tokenizer = models.load_tokenizer(str(SFT))
    complete = sampler(
        model_of(name),
        Sampling(
            max_new_tokens=params.data.max_completion_tokens,
            temperature=1.0,
            eos=models.eos(tokenizer),
            batch_size=params.sample.batch_size,
        ),
        compute,
    )
    asked = [prompts["tokens"][number] for number in numbers]
    tokens = complete(asked, [FIRST_SEED + place for place in range(len(asked))], title=name)
    rows = list(map(Row, asked, tokens))

    policy, reference = (models.load_policy(str(path)) for path in (model_of(name), SFT))
    kl = np.empty(len(rows))
    with tqdm(total=len(rows), desc="score", unit="completion", mininterval=5) as bar:
        for batch in batches(policy, range(len(rows)), _alone(rows), compute.token_budget):
            # The model that is not learning is the one that samples: KL(policy || reference).
            with torch.no_grad():
                _, of_tokens = token_logps_and_kls(
                    reference,
                    policy,
                    [rows[place] for place in batch],
                    compute_dtype=models.DTYPES[compute.dtype],
                )
            kl[batch] = [values.sum().item() for values in of_tokens]
            bar.update(len(batch))

    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    read = [
        Text(prompts["text"][number], text) for number, text in zip(numbers, texts, strict=True)
    ]
    features = target.measure(read).numpy()
    return {
        "run": name,
        "samples": len(rows),
        "prompts": len(known),
        "policy": {
            feature: _mean(features[:, place], each) for place, feature in enumerate(target.names)
        },
        "kl_to_reference": _mean(kl, each),
        "target": {key.removeprefix("fit/"): value for key, value in target.report.items()},
    }


def _alone(rows: Sequence[Row]) -> Callable[[int], list[Row]]:
    return lambda place: [rows[place]]


def _mean(values: np.ndarray, each: int) -> dict[str, float]:
    """With the standard error by prompts, whose samples lie together."""
    of_prompts = values.reshape(-1, each).mean(1)
    error = of_prompts.std(ddof=1) / len(of_prompts) ** 0.5
    return {"mean": round(float(values.mean()), 6), "standard_error": round(float(error), 6)}


if __name__ == "__main__":
    program(main)
