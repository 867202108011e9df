"""One self-contained page of the whole comparison: `python -m stages.report`.

The page is a function of the artefacts and the parameters alone, because DVC compares its bytes:
it holds no time and no commit. `python -m stages.report --publish` copies it to `report/` and
stamps the copy with the commit and the digest of dvc.lock.
"""

import argparse
import base64
import hashlib
import html
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.artefacts import (
    COMPARISON,
    PROMPTS,
    PROMPTS_SCHEMA,
    REPORT,
    WORK,
    digest,
    judgements_of,
    map_table,
    program,
    samples_of,
    stage,
)
from stages.best_of import best_of
from stages.cards import load_cards
from stages.figures import LEAST_WATCHED, draw, inline
from stages.params import Params, dump_yaml, load_params
from stages.remedies import advice
from stages.results import (
    OPPONENTS,
    Reference,
    Result,
    inputs_of,
    load_comparison,
    load_reference,
    load_results,
    load_reward_models,
)
from stages.tables import (
    LATE_STEPS,
    NO_DIFFERENCE,
    agreements,
    certainty_rows,
    elo_rows,
    markdown,
    matrices,
    power,
    result_columns,
    setting_rows,
    signed,
    spans,
    summary,
    target_rows,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("report.css")
SCRIPT = Path(__file__).with_name("report.js")
LOCK = Path("dvc.lock")
PUBLISHED = Path("report")
UNSTAMPED = "<!--stamp-->unstamped: run <code>make repro</code><!--/stamp-->"

NUM_SHOWN = 10  # prompts in full view
NUM_FOLDED = 30  # further prompts, folded
NUM_WATCHED = 3  # prompts whose generations during training are shown
SUSPICIOUS_NLL = 1.15  # times SFT's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help=f"stamp a copy: {PUBLISHED}/")
    if parser.parse_args().publish:
        sys.stdout.write(f"{publish(head_commit(), lock_digest()) / 'index.html'}\n")
        return
    params = load_params()
    inputs = [PROMPTS, COMPARISON, samples_of("sft"), *inputs_of(params)]
    for name in params.runs:
        inputs += [judgements_of(name), samples_of(name)]
    with stage(
        "report",
        inputs=[*inputs, TEMPLATE, STYLE, SCRIPT],
        outputs=[REPORT],
        params=params.model_dump(),
    ) as workspace:
        write_report(workspace.partial(REPORT), params, inputs)


def write_report(directory: Path, params: Params, inputs: Sequence[Path]) -> None:
    results = load_results(params)
    reference = load_reference(params, results[0])
    comparison = load_comparison()
    columns = result_columns(params, results, reference)
    figures = directory / "figures"
    figures.mkdir(parents=True)
    (directory / "results.md").write_text(markdown(params, results, columns))
    (directory / "results.txt").write_text(summary(params, results))
    cards, reward_models = load_cards(params), load_reward_models(params)
    drawn = draw(figures, params, results, reference, comparison, reward_models)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = SCRIPT.read_text()
    page = environment.get_template(TEMPLATE.name).render(
        signed=signed,
        params=params,
        results=results,
        opponents=OPPONENTS,
        columns=columns,
        spans=spans(columns),
        lead=lead(params, results, comparison),
        picked=[result for result in results if best_of(params, result.name)],
        cautions=cautions(params, results),
        num_prompts=len(reference.texts),
        certainty=certainty_rows(params, results, cards),
        power=power(params, results),
        matrices=matrices(params, comparison),
        elo=elo_rows(comparison),
        frontier=comparison["frontier"],
        least_watched=LEAST_WATCHED,
        settings=setting_rows(comparison),
        targets=target_rows(results),
        late_steps=LATE_STEPS,
        advice=advice(params, results),
        figures={name: inline(figures / f"{name}.svg", name) for name in drawn},
        samples=shown_samples(params, results, reference),
        num_shown=NUM_SHOWN,
        num_watched=NUM_WATCHED,
        prompts=map_table(PROMPTS, PROMPTS_SCHEMA)["text"],
        agreements=agreements(params, results),
        cards=cards,
        reward_models=reward_models,
        resolved=dump_yaml(params.model_dump()),
        digests={str(path): digest(path) for path in inputs},
        style=Markup(STYLE.read_text()),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        stamp=Markup(UNSTAMPED),
    )
    (directory / "index.html").write_text(page)


def publish(commit: str, lock_digest: str) -> Path:
    """Copy the report to `report/`, stamped with what produced it.

    Raises:
        ValueError: if there is no report.
    """
    page = REPORT / "index.html"
    if not page.is_file():
        raise ValueError(f"{page}: no such file, got nothing to publish; run `dvc repro report`")
    text = page.read_text()
    assert text.count(UNSTAMPED) == 1, f"{page}: no place for the stamp"
    stamp = (
        f"git commit <code>{html.escape(commit)}</code>, "
        f"SHA-256 of dvc.lock <code>{html.escape(lock_digest)}</code>"
    )
    partial = WORK / "published"
    shutil.rmtree(partial, ignore_errors=True)
    # Contents only: DVC's files may be read-only links into its cache.
    shutil.copytree(REPORT, partial, copy_function=shutil.copyfile)
    (partial / "index.html").write_text(text.replace(UNSTAMPED, stamp))
    shutil.rmtree(PUBLISHED, ignore_errors=True)
    return partial.replace(PUBLISHED)


def head_commit() -> str:
    """HEAD, with `-dirty` where tracked files differ; dvc.lock has a stamp of its own."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        raise ValueError(f"git: no commit to stamp, got {head.stderr.strip()!r}; commit first")
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){LOCK}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def lock_digest() -> str:
    """SHA-256 of dvc.lock, as `sha256sum` gives it."""
    if not LOCK.is_file():
        raise ValueError(f"{LOCK}: no such file, got nothing to stamp; run `dvc repro`")
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()


def best_run(params: Params, results: Sequence[Result]) -> Result | None:
    """The highest win rate over SFT by the gold reward; of equals, the first in params.yaml.

    Best-of-N is left out, because it picks what it shows by that reward; None if there is nothing
    else.
    """
    return max(
        (result for result in results if not best_of(params, result.name)),
        key=lambda result: result.metrics["win_rate"]["sft"][params.label.reward]["value"],
        default=None,
    )


def lead(
    params: Params, results: Sequence[Result], comparison: dict[str, Any]
) -> dict[str, Any] | None:
    """What the page says first: the best run, and which others it is not shown to beat.

    By the paired comparisons with Holm's correction, where trainings of one objective with several
    seeds are one; so another may be better than the family of the best run. None if no run may be
    called best.
    """
    best = best_run(params, results)
    if best is None:
        return None
    pairs = [
        pair
        for pair in comparison["win_rate"]["sft"][params.label.reward]
        if best.name in (names := names_in(pair["first"]) + names_in(pair["second"]))
        and not any(best_of(params, name) for name in names)
    ]
    beaten, equals, better = list[str](), list[str](), list[str]()
    for pair in pairs:
        first = best.name in names_in(pair["first"])
        own, other = (pair["first"], pair["second"]) if first else (pair["second"], pair["first"])
        if pair["verdict"] == NO_DIFFERENCE:
            equals.append(other)
        else:
            (beaten if pair["verdict"].startswith(f"{own} beats ") else better).append(other)
    return {
        "best": best,
        "estimate": best.metrics["win_rate"]["sft"][params.label.reward],
        "beaten": beaten,
        "equals": equals,
        "better": better,
    }


def names_in(family: str) -> list[str]:
    """The runs that a comparison's name joins."""
    return family.split(" + ")


def cautions(params: Params, results: Sequence[Result]) -> dict[str, list[str]]:
    """Run -> what suggests that it pleased the gold reward and not a reader."""
    found: dict[str, list[str]] = {}
    for result in results:
        metrics, reasons = result.metrics, []
        excess = metrics["nll_under_sft"] / metrics["nll_of_sft"]
        if excess > SUSPICIOUS_NLL:
            reasons.append(
                f"the NLL of its completions under SFT is {excess - 1:.0%} above SFT's own"
                f" ({metrics['nll_under_sft']:.2f} against {metrics['nll_of_sft']:.2f} nats)"
            )
        rates = metrics["win_rate"]["sft"]
        gold = rates[params.label.reward]["value"]
        for judge in params.evaluation.judges:
            other = rates[judge]
            if (gold - 0.5) * (other["value"] - 0.5) < 0:
                unsure = other["low"] <= 0.5 <= other["high"]
                reasons.append(
                    f"{judge} stands on the other side of one half: {other['value']:.2f}"
                    f" ({other['low']:.2f} to {other['high']:.2f}) against {gold:.2f}"
                    f" by {params.label.reward}"
                    + (", though its interval includes one half" if unsure else "")
                )
        if reasons:
            found[result.name] = reasons
    return found


def shown_samples(
    params: Params, results: Sequence[Result], reference: Reference
) -> list[dict[str, Any]]:
    """The first evaluation prompts with everybody's completions; the best run's come first."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    best = best_run(params, results)
    ordered = sorted(results, key=lambda result: result is not best)
    return [
        {
            "prompt": prompts["text"][number],
            "sft": reference.texts[number],
            "gold": prompts["gold"][number],
            "runs": [
                {
                    "run": result,
                    "text": result.texts[number],
                    "verdicts": [
                        (opponent, judge, result.judgements[number, opponent, judge])
                        for opponent in OPPONENTS
                        for judge in params.evaluation.judges
                    ],
                }
                for result in ordered
            ],
        }
        for number in list(reference.texts)[: NUM_SHOWN + NUM_FOLDED]
    ]


if __name__ == "__main__":
    program(main)
