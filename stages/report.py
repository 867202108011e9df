"""One self-contained page of the whole comparison: `python -m stages.report`.

The page is a function of the artefacts and the parameters alone, because DVC compares its bytes:
it holds no time and no commit. `python -m stages.report --publish` copies it to `report/` and
stamps the copy with the commit and the digest of dvc.lock.
"""

import argparse
import hashlib
import html
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.artefacts import (
    PROMPTS,
    PROMPTS_SCHEMA,
    REPORT,
    WORK,
    curve_of,
    digest,
    judgements_of,
    map_table,
    metrics_of,
    program,
    samples_of,
    stage,
)
from stages.figures import draw, inline
from stages.params import Params, dump_yaml, load_params
from stages.results import OPPONENTS, Reference, Result, load_reference, load_result

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("report.css")
LOCK = Path("dvc.lock")
PUBLISHED = Path("report")
UNSTAMPED = "<!--stamp-->unstamped: run <code>make repro</code><!--/stamp-->"

NUM_SHOWN = 10
SUSPICIOUS_NLL = 1.15  # times SFT's own


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the result table; its first cell is SFT's, then one per run."""

    group: str
    head: str
    cells: list[Cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help=f"stamp a copy: {PUBLISHED}/")
    if parser.parse_args().publish:
        sys.stdout.write(f"{publish(head_commit(), lock_digest()) / 'index.html'}\n")
        return
    params = load_params()
    inputs = [PROMPTS, samples_of("sft")]
    for name in params.runs:
        inputs += [metrics_of(name), judgements_of(name), samples_of(name), curve_of(name)]
    with stage(
        "report", inputs=[*inputs, TEMPLATE, STYLE], outputs=[REPORT], params=params.model_dump()
    ) as workspace:
        write_report(workspace.partial(REPORT), params, inputs)


def write_report(directory: Path, params: Params, inputs: Sequence[Path]) -> None:
    results = [load_result(name, number, params) for number, name in enumerate(params.runs)]
    reference = load_reference(results[0], params.label.reward)
    columns = result_columns(params, results, reference)
    figures = directory / "figures"
    figures.mkdir(parents=True)
    (directory / "results.md").write_text(markdown(params, results, columns))
    (directory / "results.txt").write_text(summary(params, results))
    drawn = draw(figures, params, results, reference)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE.name).render(
        params=params,
        results=results,
        columns=columns,
        lead=lead(params, results),
        cautions=cautions(params, results),
        num_prompts=len(reference.texts),
        figures={name: inline(figures / f"{name}.svg", name) for name in drawn},
        samples=shown_samples(params, results, reference),
        resolved=dump_yaml(params.model_dump()),
        digests={str(path): digest(path) for path in inputs},
        style=Markup(STYLE.read_text()),
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


def best_run(params: Params, results: Sequence[Result]) -> Result:
    """The highest win rate over SFT by the gold reward; of equals, the first in params.yaml."""
    return max(results, key=lambda r: r.metrics["win_rate"]["sft"][params.label.reward]["value"])


def lead(params: Params, results: Sequence[Result]) -> dict[str, Any]:
    """What the page says first: the best run, and whom its interval does not leave behind."""
    best = best_run(params, results)
    estimate = best.metrics["win_rate"]["sft"][params.label.reward]
    rivals = [
        result.name
        for result in results
        if result is not best
        and result.metrics["win_rate"]["sft"][params.label.reward]["high"] >= estimate["low"]
    ]
    return {"best": best, "estimate": estimate, "rivals": rivals}


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


def result_columns(params: Params, results: Sequence[Result], reference: Reference) -> list[Column]:
    """The result table, for the page and for Markdown alike."""
    judges, label = params.evaluation.judges, params.label.reward

    def column(group: str, head: str, sft: str, cell: Callable[[dict[str, Any]], Cell]) -> Column:
        return Column(group, head, [Cell(sft), *(cell(result.metrics) for result in results)])

    def number(
        group: str, head: str, key: str, sft: float | None, form: str, within: str = ""
    ) -> Column:
        def cell(metrics: dict[str, Any]) -> Cell:
            return Cell(signed((metrics[within] if within else metrics)[key], form))

        return column(group, head, "" if sft is None else signed(sft, form), cell)

    def kl(metrics: dict[str, Any]) -> Cell:
        return Cell(signed(metrics["kl"], ".2f"), f"± {metrics['kl_standard_error']:.2f}")

    return [
        *(
            win_rate_column(opponent, judge, results, is_gold=judge == label)
            for opponent in OPPONENTS
            for judge in judges
        ),
        column("policy", "KL, nats", "0", kl),
        number("policy", f"reward ({label})", "reward", reference.reward, ".3f"),
        number("completions", "tokens", "length", reference.length, ".1f"),
        number("completions", "distinct 2-grams", "distinct_2", reference.distinct_2, ".3f"),
        number("completions", "NLL a token", "nll_under_sft", reference.nll, ".2f"),
        number("displacement", "chosen fell", "chosen_fell", None, ".0%", "displacement"),
        number("displacement", "both fell", "both_fell", None, ".0%", "displacement"),
        number("displacement", "median chosen", "median_chosen", 0.0, "+.2f", "displacement"),
        number("displacement", "median rejected", "median_rejected", 0.0, "+.2f", "displacement"),
    ]


def win_rate_column(
    opponent: str, judge: str, results: Sequence[Result], *, is_gold: bool
) -> Column:
    rates = [result.metrics["win_rate"][opponent][judge] for result in results]
    highest = max(rate["value"] for rate in rates)
    cells = [
        Cell(
            f"{rate['value']:.2f}",
            f"{rate['low']:.2f}\N{EN DASH}{rate['high']:.2f}",
            rate["value"] == highest,
        )
        for rate in rates
    ]
    head = f"{judge} (gold reward)" if is_gold else judge
    return Column(f"win rate over {OPPONENTS[opponent]}", head, [Cell(""), *cells])


def signed(value: float, form: str) -> str:
    """A number with a true minus sign, and no minus zero."""
    text = format(value, form)
    if not re.search("[1-9]", text):
        text = text.lstrip("-+")
    return text.replace("-", "\N{MINUS SIGN}")


def markdown(params: Params, results: Sequence[Result], columns: Sequence[Column]) -> str:
    heads = ["run", "loss", *(f"{column.group}: {column.head}" for column in columns)]
    rows = [["sft", "the reference"], *([f"`{r.name}`", r.specification] for r in results)]
    lines = [heads, ["---", "---", *["---:"] * len(columns)]]
    for number, row in enumerate(rows):
        cells = [column.cells[number] for column in columns]
        lines.append(
            [*row, *(" ".join(filter(None, [c.text, c.note])) or "\N{EN DASH}" for c in cells)]
        )
    table = "\n".join("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines)
    return (
        f"# {params.recipe}\n\n{table}\n\n"
        "Win rates with 95% bootstrap intervals over prompts, ties counting one half; KL to the "
        "reference in nats a completion, ± its standard error; NLL under SFT in nats.\n"
    )


def summary(params: Params, results: Sequence[Result]) -> str:
    """The main figures of each run for a terminal of 100 columns."""
    judges = params.evaluation.judges
    heads = [f"over SFT, {judge}" for judge in judges] + ["KL", "reward", "NLL/SFT's"]
    lines = ["run".ljust(18) + "".join(head.rjust(21) for head in heads[: len(judges)])]
    lines[0] += "".join(head.rjust(10) for head in heads[len(judges) :])
    for result in results:
        metrics = result.metrics
        line = result.name.ljust(18)
        for judge in judges:
            rate = metrics["win_rate"]["sft"][judge]
            line += f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]".rjust(21)
        ratio = metrics["nll_under_sft"] / metrics["nll_of_sft"]
        line += f"{metrics['kl']:10.2f}{metrics['reward']:10.3f}{ratio:10.3f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def shown_samples(
    params: Params, results: Sequence[Result], reference: Reference
) -> list[dict[str, Any]]:
    """The first evaluation prompts with everybody's completions; the best run comes first."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    best = best_run(params, results)
    ordered = [best, *(result for result in results if result is not best)]
    return [
        {
            "prompt": prompts["text"][number],
            "sft": reference.texts[number],
            "gold": prompts["gold"][number],
            "runs": [
                {
                    "run": result,
                    "text": result.texts[number],
                    "verdicts": {
                        opponent: {
                            judge: result.judgements[number, opponent, judge]
                            for judge in params.evaluation.judges
                        }
                        for opponent in OPPONENTS
                    },
                }
                for result in ordered
            ],
        }
        for number in list(reference.texts)[:NUM_SHOWN]
    ]


if __name__ == "__main__":
    program(main)
