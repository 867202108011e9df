"""Compare a run's samples with SFT's and with the data's own: `python -m stages.judge RUN`."""

import argparse
from typing import Any

from stages import judges
from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    judgements_of,
    map_table,
    program,
    read_table,
    samples_of,
    stage,
    write_table,
)
from stages.params import load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    evaluation = load_params().evaluation
    with stage(
        f"judge@{name}",
        inputs=[PROMPTS, samples_of("sft"), samples_of(name)],
        outputs=[judgements_of(name)],
        params=evaluation.judges,
    ) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        samples = read_table(samples_of(name), SAMPLES_SCHEMA)
        sft = read_table(samples_of("sft"), SAMPLES_SCHEMA)
        if sft["prompt"] != samples["prompt"]:
            raise ValueError(
                f"{samples_of(name)}: other prompts than {samples_of('sft')}, got "
                f"{len(samples['prompt'])} against {len(sft['prompt'])}; run `dvc repro`"
            )
        opponents = {
            "sft": sft["text"],
            "gold": [prompts["gold"][number] for number in samples["prompt"]],
        }
        columns: dict[str, list[Any]] = {field: [] for field in JUDGEMENTS_SCHEMA.names}
        for judge in evaluation.judges:
            reward = judges.reward(judge)
            for opponent, completions in opponents.items():
                for number, ours, theirs in zip(
                    samples["prompt"], samples["text"], completions, strict=True
                ):
                    prompt = prompts["text"][number]
                    rewards = reward(prompt + ours), reward(prompt + theirs)
                    columns["prompt"].append(number)
                    columns["opponent"].append(opponent)
                    columns["judge"].append(judge)
                    columns["verdict"].append(judges.verdict(*rewards))
                    columns["policy_reward"].append(rewards[0])
                    columns["opponent_reward"].append(rewards[1])
        write_table(workspace.partial(judgements_of(name)), columns, JUDGEMENTS_SCHEMA)


if __name__ == "__main__":
    program(main)
