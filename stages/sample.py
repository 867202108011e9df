"""Sample K completions of each prompt from the SFT policy: `python -m stages.sample`.

Of training prompts, and of validation prompts for the looks at a run while it trains.
"""

from stages import models
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SFT,
    map_table,
    program,
    rows_of_split,
    stage,
    write_table,
)
from stages.params import load_params
from stages.sampling import Sampling, sampler


def main() -> None:
    params = load_params()
    compute, settings = params.compute, params.sample
    models.set_up(seed=compute.seed, num_threads=compute.num_threads)
    relevant = {"compute": compute.model_dump(), "sample": settings.model_dump()}
    with stage("sample", inputs=[PROMPTS, SFT], outputs=[CANDIDATES], params=relevant) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        train = rows_of_split(prompts, "train")
        if settings.num_prompts > len(train):
            raise ValueError(
                "sample.num_prompts: more than the training split has, got "
                f"{settings.num_prompts}; at most {len(train)}"
            )
        validation = rows_of_split(prompts, "validation")
        # Apart, so that the training candidates' bits do not depend on how many others there are.
        parts = [train[: settings.num_prompts], validation[: settings.num_validation_prompts]]
        # Candidates of one prompt lie together.
        parts = [[row for row in part for _ in range(settings.num_completions)] for part in parts]
        tokenizer = models.load_tokenizer(str(SFT))
        sampling = Sampling(
            max_new_tokens=params.data.max_completion_tokens,
            temperature=settings.temperature,
            eos=models.eos(tokenizer),
            batch_size=settings.batch_size,
        )
        complete = sampler(SFT, sampling, compute)
        rows: list[int] = []
        tokens: list[list[int]] = []
        for part, title in zip(parts, ("sample", "validation"), strict=True):
            first = compute.seed * 1_000_003 + len(rows)
            rows += part
            tokens += complete(
                [prompts["tokens"][row] for row in part],
                range(first, first + len(part)),
                title=title,
            )
        columns = {
            "prompt": rows,
            "text": tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
        }
        write_table(workspace.partial(CANDIDATES), columns, CANDIDATES_SCHEMA)


if __name__ == "__main__":
    program(main)
