"""Sample K completions of each training prompt from the SFT policy: `python -m stages.sample`."""

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
        # Candidates of one prompt lie together.
        rows = [
            row for row in train[: settings.num_prompts] for _ in range(settings.num_completions)
        ]
        tokenizer = models.load_tokenizer(str(SFT))
        sampling = Sampling(
            max_new_tokens=params.data.max_completion_tokens,
            temperature=settings.temperature,
            eos=models.eos(tokenizer),
            batch_size=settings.batch_size,
        )
        tokens = sampler(SFT, sampling, compute)(
            [prompts["tokens"][row] for row in rows],
            [compute.seed * 1_000_003 + index for index in range(len(rows))],
            title="sample",
        )
        columns = {
            "prompt": rows,
            "text": tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
        }
        write_table(workspace.partial(CANDIDATES), columns, CANDIDATES_SCHEMA)


if __name__ == "__main__":
    program(main)
