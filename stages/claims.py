"""Hold what artefacts claim against what they come from: `python -m stages.claims`.

Prints JSON for `prefopt audit`: how many claims were looked at, and those that do not hold. Nothing
is trained, sampled or judged again: splits, rankings, verdicts, headline numbers, the tables of the
report and of the frontier, and which weights a model says that it adapts.
"""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.metrics import best_of_kl_bound
from prefopt.statistics.intervals import points, win_rate
from stages.artefacts import (
    COMPARISON,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    FRONTIER,
    JUDGEMENTS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    RANKINGS,
    RANKINGS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    REPORT,
    SAMPLES_SCHEMA,
    judgements_of,
    logratios_of,
    map_table,
    metrics_of,
    model_of,
    program,
    read_table,
    reliability_of,
    reward_metrics_of,
    rows_of_split,
    samples_of,
    weights_digest,
)
from stages.best_of import best_of
from stages.frontier import table_of
from stages.leaks import leaks
from stages.params import Params, load_params
from stages.results import load_reference, load_results
from stages.tables import markdown, result_columns, summary
from stages.verdicts import judgements, prompts_of, questions, rows_where, samples

ADAPTED = "adapted.json"
PUBLISHED = Path("report")
STAMP = re.compile("SHA-256 of dvc.lock <code>([0-9a-f]{64})</code>")
LINE_OF_STAMP = re.compile('<p class="stamp">.*</p>')
NUM_SHOWN = 3
EVALUATED = ("test", "shifted")


@dataclass(frozen=True)
class Claim:
    """What an artefact says, what it should say, and what to do if those differ."""

    check: str
    artefact: str
    expected: str
    found: str
    remedy: str
    severity: str = "failed"

    @property
    def holds(self) -> bool:
        return self.expected == self.found


def main() -> None:
    params = load_params()
    looked_at = [
        *of_judges(params),
        *of_splits(params),
        *of_pairs(),
        *of_rankings(params),
        *of_rewards(params),
        *of_row_counts(params),
        *of_models(params),
        *of_samples(params),
        *of_verdicts(params),
        *of_metrics(params),
        *of_frontier(),
        *of_report(params),
        *of_publication(),
    ]
    failing = [asdict(claim) for claim in looked_at if not claim.holds]
    sys.stdout.write(json.dumps({"num_checks": len(looked_at), "findings": failing}) + "\n")


def of_judges(params: Params) -> Iterator[Claim]:
    """A judge that labelled is no independent witness, though parameters may say so openly."""
    for judge in params.evaluation.judges:
        labelled = params.label.method != "given" and judge == params.label.reward
        yield Claim(
            "judge",
            str(PAIRS),
            "judges that label nothing",
            f"{judge}, which labels and judges" if labelled else "judges that label nothing",
            "read the other judges too: params.yaml declares it",
            "note",
        )


def of_splits(params: Params) -> Iterator[Claim]:
    """No evaluation prompt is a training prompt, and no evaluation text nearly repeats one."""
    table = map_table(PROMPTS, PROMPTS_SCHEMA)
    prompts = [prompt.casefold() for prompt in table["text"]]
    evaluated = [row for row, split in enumerate(table["split"]) if split != "train"]
    trained = [row for row, split in enumerate(table["split"]) if split == "train"]
    known = {prompts[row]: row for row in trained}
    shared = [(row, known[prompts[row]]) for row in evaluated if prompts[row] in known]
    remedy = "run `dvc repro --force prepare` on data without repeats"
    yield Claim(
        "overlap",
        str(PROMPTS),
        "no prompt in two splits",
        _rows(shared) or "no prompt in two splits",
        remedy,
    )

    def whole(row: int) -> str:
        return table["text"][row] + table["gold"][row]

    near = leaks(map(whole, trained), map(whole, evaluated))
    pairs = [(evaluated[leak.evaluation], trained[leak.training]) for leak in near]
    yield Claim(
        "near repeats",
        str(PROMPTS),
        "no text near another split's",
        _rows(pairs) or "no text near another split's",
        remedy,
    )
    sizes = {"train": params.data.num_train, "validation": params.data.num_validation}
    sizes |= {"test": params.data.num_test, "shifted": params.data.num_shifted}
    for split, size in sizes.items():
        if size is not None:
            found = sum(each == split for each in table["split"])
            yield Claim(f"rows of {split}", str(PROMPTS), str(size), str(found), remedy)


def _rows(pairs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"rows {first} and {second}" for first, second in pairs[:NUM_SHOWN])
    more = f" and {len(pairs) - NUM_SHOWN} more" if len(pairs) > NUM_SHOWN else ""
    return shown + more


def of_pairs() -> Iterator[Claim]:
    """No pair is of an evaluation prompt, and every pair is of the split that it names."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    split_of = dict(zip(map(tuple, prompts["tokens"]), prompts["split"], strict=True))
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    pairs = map_table(PAIRS, PAIRS_SCHEMA)
    strangers = [
        f"row {row} of '{split_of.get(tuple(completions['prompt'][chosen]), 'no')}'"
        for row, (chosen, split) in enumerate(zip(pairs["chosen"], pairs["split"], strict=True))
        if split_of.get(tuple(completions["prompt"][chosen])) != split
    ]
    yield Claim(
        "overlap",
        str(PAIRS),
        "pairs of prompts of their split",
        ", ".join(islice(strangers, NUM_SHOWN)) or "pairs of prompts of their split",
        "run `dvc repro --force label`",
    )


def of_rankings(params: Params) -> Iterator[Claim]:
    """A ranking is of one prompt, of the split that it names, and of as many as were asked for."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    split_of = dict(zip(map(tuple, prompts["tokens"]), prompts["split"], strict=True))
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    rankings = map_table(RANKINGS, RANKINGS_SCHEMA)
    wrong: list[str] = []
    rows = zip(*(rankings[column] for column in RANKINGS_SCHEMA.names), strict=True)
    for number, (split, ranked, rewards) in enumerate(rows):
        splits = {split_of.get(tuple(completions["prompt"][each])) for each in ranked}
        one = len({tuple(completions["prompt"][each]) for each in ranked}) == 1
        sizes = {len(ranked), len(rewards)}
        if not one or splits != {split} or sizes != {params.label.num_ranked}:
            wrong.append(f"row {number}")
    yield Claim(
        "rankings",
        str(RANKINGS),
        "rankings of one prompt of their split",
        ", ".join(wrong[:NUM_SHOWN]) or "rankings of one prompt of their split",
        "run `dvc repro --force label`",
    )


def of_rewards(params: Params) -> Iterator[Claim]:
    """What a reward model's reliability diagram counts is what its metrics say of it."""
    for name in params.reward_models:
        metrics = json.loads(reward_metrics_of(name).read_text())
        with open(reliability_of(name), newline="") as file:
            bins = [
                {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)
            ]
        num_pairs = sum(each["num_pairs"] for each in bins)
        error = sum(
            each["num_pairs"] / num_pairs * abs(each["correct"] - each["confidence"])
            for each in bins
        )
        claimed: float = metrics["calibration_error"]
        near = math.isclose(error, claimed, abs_tol=2e-6)  # Of numbers with six decimals.
        for what, expected, found in (
            ("pairs/held_out", int(num_pairs), metrics["pairs"]["held_out"]),
            ("calibration_error", claimed if near else round(error, 6), claimed),
        ):
            yield Claim(
                what,
                str(reward_metrics_of(name)),
                str(expected),
                str(found),
                f"run `dvc repro --force reward@{name}`",
            )


def of_frontier() -> Iterator[Claim]:
    """The frontier's table is that of the comparison."""
    wanted = table_of(json.loads(COMPARISON.read_text())["frontier"]).splitlines()
    yield from _lines(FRONTIER, wanted, "run `dvc repro --force compare`")


def of_row_counts(params: Params) -> Iterator[Claim]:
    """The reference is of these completions, log-ratios are of these training pairs."""
    num_completions = len(map_table(COMPLETIONS, COMPLETIONS_SCHEMA)["prompt"])
    num_pairs = len(rows_of_split(map_table(PAIRS, PAIRS_SCHEMA), "train"))
    counted = [(REFERENCE, REFERENCE_SCHEMA, num_completions)]
    counted += [(logratios_of(run), LOGRATIOS_SCHEMA, num_pairs) for run in params.runs]
    for path, schema, wanted in counted:
        found = len(map_table(path, schema)[schema.names[0]])
        yield Claim("rows", str(path), f"{wanted} rows", f"{found} rows", "run `dvc repro`")


def of_models(params: Params) -> Iterator[Claim]:
    """Adapters name the weights that they were trained on."""
    for run in params.runs:
        file = model_of(run) / ADAPTED
        if file.is_file():
            identity = json.loads(file.read_text())
            yield Claim(
                "adapted weights",
                str(file),
                weights_digest(Path(identity["model"])),
                identity["weights"],
                f"restore {identity['model']}, or run `dvc repro --force train@{run}`",
            )


def of_samples(params: Params) -> Iterator[Claim]:
    """Evaluation samples are of evaluation prompts, and no seed serves twice."""
    splits = (params.evaluation.split, *EVALUATED)
    evaluated = {row for split in splits for row in prompts_of(split)}
    seeds: dict[str, set[int]] = {}
    for name in ("sft", *params.runs):
        table = read_table(samples_of(name), SAMPLES_SCHEMA)
        strangers = sorted(set(table["prompt"]) - evaluated)
        yield Claim(
            "prompts",
            str(samples_of(name)),
            "evaluation prompts",
            f"rows {strangers[:NUM_SHOWN]} of prompts" if strangers else "evaluation prompts",
            f"run `dvc repro --force complete@{name}`",
        )
        seeds[name] = set(table["seed"])
        twice = len(table["seed"]) - len(seeds[name])
        shared = 0 if name == "sft" else len(seeds["sft"] & seeds[name])
        yield Claim(
            "seeds",
            str(samples_of(name)),
            "seeds that serve once",
            f"{twice} that serve twice, {shared} of SFT's"
            if twice or shared
            else "seeds that serve once",
            f"run `dvc repro --force complete@{name}`",
        )


def of_verdicts(params: Params) -> Iterator[Claim]:
    """Verdicts go with the rewards that they were made from, and are of all samples."""
    for name in params.runs:
        table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
        columns = ("verdict", "policy_reward", "opponent_reward")
        wrong = [
            row
            for row, (verdict, ours, theirs) in enumerate(
                zip(*(table[column] for column in columns), strict=True)
            )
            if (verdict == "policy" and ours < theirs) or (verdict == "opponent" and ours > theirs)
        ]
        yield Claim(
            "verdicts",
            str(judgements_of(name)),
            "verdicts for the higher reward",
            f"others in rows {wrong[:NUM_SHOWN]}" if wrong else "verdicts for the higher reward",
            f"run `dvc repro --force judge@{name}`",
        )
        sampled = set(read_table(samples_of(name), SAMPLES_SCHEMA)["prompt"])
        yield Claim(
            "prompts",
            str(judgements_of(name)),
            f"{len(sampled)} prompts that were sampled",
            f"{len(sampled & set(table['prompt']))} prompts that were sampled",
            f"run `dvc repro --force judge@{name}`",
        )


def of_metrics(params: Params) -> Iterator[Claim]:
    """Win rates follow from verdicts; KL, length and displacement from samples and log-ratios."""
    prompts = prompts_of(params.evaluation.split)
    for name in params.runs:
        claimed = json.loads(metrics_of(name).read_text())
        for where, number in _headline(name, prompts, params):
            found: Any = claimed
            for key in where:
                found = found.get(key) if isinstance(found, dict) else None
            yield Claim(
                "/".join(where),
                str(metrics_of(name)),
                str(round(number, 6)),
                str(found),
                f"run `dvc repro --force evaluate@{name}`",
            )


def _headline(name: str, prompts: range, params: Params) -> Iterator[tuple[tuple[str, ...], float]]:
    judged, written = judgements(name, prompts), samples(name, prompts)
    for opponent, judge in questions([judged]):
        rows = rows_where(judged, opponent=opponent, judge=judge)
        estimate = win_rate(points(rows["verdict"]), np.array(rows["prompt"]))
        for key, value in asdict(estimate).items():
            yield ("win_rate", opponent, judge, key), value
        for verdict in ("policy", "opponent", "tie"):
            yield ("win_rate", opponent, judge, verdict), rows["verdict"].count(verdict)
    rewards = rows_where(judged, judge=params.label.reward, opponent="sft")["policy_reward"]
    yield ("reward",), float(np.mean(rewards))
    logratio = np.array(written["logp"]) - np.array(written["reference_logp"])
    best = best_of(params, name)
    yield ("kl",), best_of_kl_bound(best.best_of) if best else float(logratio.mean())
    yield ("length",), float(np.mean([len(tokens) for tokens in written["tokens"]]))


def of_report(params: Params) -> Iterator[Claim]:
    """The report's tables follow from the metrics."""
    results = load_results(params)
    columns = result_columns(params, results, load_reference(params, results[0]))
    for file, text in (
        ("results.md", markdown(params, results, columns)),
        ("results.txt", summary(params, results)),
    ):
        yield from _lines(REPORT / file, text.splitlines(), "run `dvc repro --force report`")


def _lines(path: Path, wanted: Sequence[str], remedy: str) -> Iterator[Claim]:
    """A file has these lines; the first that differs is named."""
    written = path.read_text().splitlines()
    differing = [
        number
        for number in range(max(len(written), len(wanted)))
        if written[number : number + 1] != list(wanted[number : number + 1])
    ]
    line = next(iter(differing), 0)
    yield Claim(
        f"line {line + 1}",
        str(path),
        " ".join(wanted[line : line + 1]),
        " ".join(written[line : line + 1]),
        remedy,
    )


def of_publication() -> Iterator[Claim]:
    """The page that was published is the report, and its stamp names the present dvc.lock."""
    page = PUBLISHED / "index.html"
    if not page.is_file():
        return
    text, remedy = page.read_text(), "run `python -m stages.report --publish`"
    stamped = STAMP.search(text)
    lock = hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest()
    yield Claim("stamp", str(page), lock, stamped[1] if stamped else "no stamp", remedy, "unknown")
    unstamped = (REPORT / page.name).read_text()
    bodies = [LINE_OF_STAMP.sub("", each) for each in (unstamped, text)]
    wanted, found = (hashlib.sha256(body.encode()).hexdigest() for body in bodies)
    yield Claim("page", str(page), wanted, found, remedy)


if __name__ == "__main__":
    program(main)
