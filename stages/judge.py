"""Compare a run's samples with SFT's and with the data's own: `python -m stages.judge RUN`."""

import argparse
from dataclasses import asdict
from typing import Any

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
from stages.judges import Comparison, check_judge, estimate, load_judge
from stages.params import EndpointJudge, load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    with stage(
        f"judge@{name}",
        inputs=[PROMPTS, samples_of("sft"), samples_of(name)],
        outputs=[judgements_of(name)],
        params={
            "judges": params.judges,
            "rewards": params.rewards,
            "evaluation": params.evaluation.judges,
        },
    ) as workspace:
        comparisons = comparisons_of(name)
        columns: dict[str, list[Any]] = {field: [] for field in JUDGEMENTS_SCHEMA.names}
        for judge in params.evaluation.judges:
            judgements = load_judge(params, judge, name).judge(comparisons)
            for each, judgement in zip(comparisons, judgements, strict=True):
                columns["prompt"].append(each.number)
                columns["revision"].append(each.revision)
                columns["opponent"].append(each.against)
                columns["judge"].append(judge)
                columns["order_consistent"].append(judgement.order_consistent)
                for field, value in asdict(judgement).items():
                    columns[field].append(value)
        write_table(workspace.partial(judgements_of(name)), columns, JUDGEMENTS_SCHEMA)


def comparisons_of(name: str) -> list[Comparison]:
    """The run's samples beside SFT's, then beside the data's own completions.

    Raises:
        ValueError: if the samples are of different prompts.
    """
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    samples = read_table(samples_of(name), SAMPLES_SCHEMA)
    sft = read_table(samples_of("sft"), SAMPLES_SCHEMA)
    keys = list(zip(samples["prompt"], samples["revision"], strict=True))
    if list(zip(sft["prompt"], sft["revision"], strict=True)) != keys:
        raise ValueError(
            f"{samples_of(name)}: other prompts than {samples_of('sft')}, got "
            f"{len(samples['prompt'])} against {len(sft['prompt'])}; run `dvc repro`"
        )
    # Revisions too are held against what SFT wrote at first.
    texts = {
        number: text
        for (number, revision), text in zip(keys, sft["text"], strict=True)
        if not revision
    }
    opponents = {
        "sft": texts,
        "gold": {number: prompts["gold"][number] for number in texts},
    }
    return [
        Comparison(number, prompts["text"][number], ours, theirs[number], opponent, revision)
        for opponent, theirs in opponents.items()
        for (number, revision), ours in zip(keys, samples["text"], strict=True)
    ]


def estimates() -> str:
    """What the judges of the evaluation are, and what endpoints have still to be asked."""
    params = load_params()
    sampled = [name for name in params.runs if samples_of(name).is_file()]
    lines: list[str] = []
    for name in params.evaluation.judges:
        if name in params.known_rewards:
            lines.append(f"{name}: a reward, costs no calls")
            continue
        declared = check_judge(params, name)
        if not isinstance(declared, EndpointJudge):
            lines.append(f"{name}: {declared.kind}, costs no calls")
            continue
        comparisons = [each for run in sampled for each in comparisons_of(run)]
        found = estimate(name, declared, comparisons)
        lines.append(f"{found}; {len(sampled)} of {len(params.runs)} runs have samples")
    return "\n".join(lines)


if __name__ == "__main__":
    program(main)
