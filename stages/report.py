"""One self-contained page of the whole comparison: `python -m stages.report`.

The page is a function of the artefacts and the parameters alone, because DVC compares its bytes:
it holds no time and no commit. `python -m stages.report --publish` copies it to `report/` and
stamps the copy with the commit and the digest of dvc.lock.
"""

import argparse
import csv
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from prefopt.metrics import distinct
from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REPORT,
    SAMPLES_SCHEMA,
    WORK,
    curve_of,
    digest,
    judgements_of,
    metrics_of,
    read_table,
    samples_of,
    stage,
)
from stages.params import Params, load_params

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("report.css")
LOCK = Path("dvc.lock")
PUBLISHED = Path("report")
UNSTAMPED = "<!--stamp-->unstamped: run <code>make repro</code><!--/stamp-->"

NUM_SHOWN = 10
SUSPICIOUS_NLL = 1.15  # times SFT's own
OPPONENTS = {"sft": "SFT", "gold": "gold"}

# Mid-tones that a colour-blind eye tells apart (after Okabe and Ito), legible on light and dark.
COLOURS = [
    "#0072b2", "#e08e00", "#009e73", "#cc79a7", "#d55e00", "#4fa9dc", "#8a6fc2", "#8f8a2b",
]  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # coprime to the colours: 56 runs look different
# Where a point's name may stand, in points from it: at its corners first, then farther out.
DIRECTIONS = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
LABEL_OFFSETS = [(x * far, y * far) for far in (5, 13, 22, 34, 50, 70) for x, y in DIRECTIONS]
# The figures' other colours, and the page's names for them: inline they follow light and dark.
INK, MUTED, GRID, PAPER = "#1f2430", "#69707d", "#e2e5ea", "#fffffe"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--card)"}
FIGURE_FONT = "DejaVu Sans"  # comes with matplotlib, so that layouts are the same everywhere
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
STYLE_OF_FIGURES: dict[str, Any] = {
    "svg.hashsalt": "prefopt",
    "svg.fonttype": "none",
    "font.family": FIGURE_FONT,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Judgement:
    verdict: str
    policy_reward: float
    opponent_reward: float


@dataclass(frozen=True)
class Result:
    """All that the page tells of one run.

    Args:
        specification: the loss and its hyperparameters, in words.
        curve: column -> values by step.
        judgements: (prompt, opponent, judge) -> judgement.
        texts: prompt -> completion.
    """

    name: str
    specification: str
    colour: str
    marker: str
    metrics: dict[str, Any]
    curve: dict[str, list[float]]
    judgements: dict[tuple[int, str, str], Judgement]
    texts: dict[int, str]

    def rewards(self, opponent: str, judge: str) -> tuple[list[float], list[float]]:
        """The policy's and the opponent's rewards by one judge, a prompt each."""
        found = [j for (_, *key), j in self.judgements.items() if key == [opponent, judge]]
        return [j.policy_reward for j in found], [j.opponent_reward for j in found]


@dataclass(frozen=True)
class Reference:
    """SFT's own row of the table, and the data's mean reward."""

    reward: float
    gold_reward: float
    length: float
    distinct_2: float
    nll: float
    texts: dict[int, str]


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
        sys.stdout.write(f"{publish(commit(), lock_digest()) / 'index.html'}\n")
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
    with rc_context(STYLE_OF_FIGURES):
        drawn = {
            "win_rates": draw_win_rates(params, results),
            "reward_kl": draw_reward_kl(params, results, reference),
            "displacement": draw_displacement(results),
            "curves": draw_curves(results),
        }
        for name, figure in drawn.items():
            save(figure, figures / f"{name}.svg")
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
        resolved=yaml.safe_dump(params.model_dump(), sort_keys=False, default_flow_style=None),
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


def commit() -> str:
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


def load_result(name: str, number: int, params: Params) -> Result:
    row = dict(params.runs[name])
    loss = row.pop("loss")
    table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    keys = zip(table["prompt"], table["opponent"], table["judge"], strict=True)
    values = zip(table["verdict"], table["policy_reward"], table["opponent_reward"], strict=True)
    samples = read_table(samples_of(name), SAMPLES_SCHEMA)
    with open(curve_of(name), newline="") as file:
        steps = list(csv.DictReader(file))
    return Result(
        name=name,
        specification=", ".join([str(loss), *(f"{key} {value}" for key, value in row.items())]),
        colour=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        metrics=json.loads(metrics_of(name).read_text()),
        curve={column: [float(step[column]) for step in steps] for column in steps[0]},
        judgements={key: Judgement(*value) for key, value in zip(keys, values, strict=True)},
        texts=dict(zip(samples["prompt"], samples["text"], strict=True)),
    )


def load_reference(result: Result, judge: str) -> Reference:
    """SFT's figures; its rewards are those of an opponent of any run."""
    samples = read_table(samples_of("sft"), SAMPLES_SCHEMA)
    return Reference(
        reward=float(np.mean(result.rewards("sft", judge)[1])),
        gold_reward=float(np.mean(result.rewards("gold", judge)[1])),
        length=float(np.mean([len(tokens) for tokens in samples["tokens"]])),
        distinct_2=distinct(samples["tokens"], 2),
        nll=result.metrics["nll_of_sft"],
        texts=dict(zip(samples["prompt"], samples["text"], strict=True)),
    )


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
                f"its completions are {excess - 1:.0%} less likely a token under SFT than SFT's own"
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
        number("completions", "distinct-2", "distinct_2", reference.distinct_2, ".3f"),
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
        "Win rates with 95 % bootstrap intervals over prompts, ties counting one half; KL to the "
        "reference in nats a completion, ± its standard error; NLL under SFT in nats.\n"
    )


def shown_samples(
    params: Params, results: Sequence[Result], reference: Reference
) -> list[dict[str, Any]]:
    """The first evaluation prompts with everybody's completions; the best run comes first."""
    prompts = read_table(PROMPTS, PROMPTS_SCHEMA)
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


def draw_win_rates(params: Params, results: Sequence[Result]) -> Figure:
    judges = params.evaluation.judges
    figure = new_figure(1.6 + 3.6 * len(judges), 1.2 + 0.5 * len(results))
    grid = figure.subplots(len(OPPONENTS), len(judges), sharex=True, sharey=True, squeeze=False)
    for row, opponent in zip(grid, OPPONENTS, strict=True):
        for axes, judge in zip(row, judges, strict=True):
            rows_of_runs(axes, results)
            axes.axvline(0.5, color=MUTED, linewidth=1)
            for place, result in enumerate(results):
                rate = result.metrics["win_rate"][opponent][judge]
                axes.hlines(place, rate["low"], rate["high"], color=result.colour, linewidth=2)
                axes.plot(rate["value"], place, marker=result.marker, color=result.colour)
            gold = ", the gold reward" if judge == params.label.reward else ""
            axes.set_title(f"over {OPPONENTS[opponent]}, by {judge}{gold}")
    for axes in grid[-1]:
        axes.set_xlabel("win rate")
    return figure


def draw_reward_kl(params: Params, results: Sequence[Result], reference: Reference) -> Figure:
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    axes.grid(True)
    axes.axhline(reference.gold_reward, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    points = [(0.0, reference.reward, "SFT")]
    bars: list[tuple[tuple[float, float], tuple[float, float]]] = []
    axes.plot(*points[0][:2], marker="o", markersize=9, color=INK, fillstyle="none")
    for result in results:
        rewards, _ = result.rewards("sft", params.label.reward)
        error = np.std(rewards, ddof=1) / len(rewards) ** 0.5
        x, y = result.metrics["kl"], result.metrics["reward"]
        spread = result.metrics["kl_standard_error"]
        axes.errorbar(
            x, y, xerr=spread, yerr=error, color=result.colour, elinewidth=1,
            marker=result.marker, markersize=8,
        )  # fmt: skip
        points.append((x, y, result.name))
        bars += [((x - spread, y), (x + spread, y)), ((x, y - error), (x, y + error))]
    axes.margins(0.12)
    axes.set_xlabel("KL(policy || reference), nats a completion")
    axes.set_title(f"mean reward by {params.label.reward}", fontweight="normal", color=MUTED)
    axes.text(
        axes.get_xlim()[1], reference.gold_reward, "gold ", ha="right", va="bottom", color=MUTED
    )
    label_points(axes, points, bars)
    return figure


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write each point's name at the nearest place around it that is still free."""
    axes.figure.draw_without_rendering()
    anchors = [axes.transData.transform(point[:2]) for point in points]
    occupied = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in anchors]
    occupied += [Bbox(axes.transData.transform(bar)).padded(1) for bar in bars]
    occupied += [text.get_window_extent() for text in axes.texts]
    for x, y, name in points:
        best: tuple[int, Annotation] | None = None
        for offset in LABEL_OFFSETS:
            label = annotate(axes, name, (x, y), offset)
            # The text's own box: an annotation's includes its arrow.
            box = Text.get_window_extent(label)
            outside = not axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
            overlaps = sum(map(box.overlaps, occupied)) + 100 * outside
            if best is None or overlaps < best[0]:
                if best is not None:
                    best[1].remove()
                best = overlaps, label
            else:
                label.remove()
            if overlaps == 0:
                break
        assert best is not None
        occupied.append(Text.get_window_extent(best[1]))


def annotate(
    axes: Axes, name: str, point: tuple[float, float], offset: tuple[int, int]
) -> Annotation:
    far = max(map(abs, offset)) > LABEL_OFFSETS[0][0]
    return axes.annotate(
        name,
        point,
        offset,
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[int(np.sign(offset[0]))],
        va={-1: "top", 0: "center", 1: "bottom"}[int(np.sign(offset[1]))],
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7} if far else None,
    )


def draw_displacement(results: Sequence[Result]) -> Figure:
    figure = new_figure(8.8, 1.4 + 0.3 * len(results))
    medians, shares = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    panels: list[tuple[Axes, str, str, str]] = [
        (medians, "median_rejected", "median_chosen", "median log-ratio, nats"),
        (shares, "both_fell", "chosen_fell", "share of pairs"),
    ]
    for axes, hollow, full, unit in panels:
        rows_of_runs(axes, results)
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, result in enumerate(results):
            values = result.metrics["displacement"]
            colour, marker = result.colour, result.marker
            axes.hlines(place, values[hollow], values[full], color=colour, linewidth=2, alpha=0.5)
            axes.plot(values[full], place, marker=marker, color=colour, markersize=7)
            axes.plot(
                values[hollow], place, marker=marker, color=colour, markersize=7,
                markerfacecolor=PAPER, markeredgewidth=1.6,
            )  # fmt: skip
        axes.set_xlabel(unit)
    medians.set_title("full: chosen, hollow: rejected")
    shares.set_title("full: chosen fell, hollow: both fell")
    shares.set_xlim(-0.03, 1.03)
    return figure


def draw_curves(results: Sequence[Result]) -> Figure:
    panels = {
        "loss": "loss",
        "rewards/margins": "margin of implicit rewards",
        "rewards/accuracies": "accuracy of implicit rewards",
    }
    figure = new_figure(9.4, 0.6 + 0.85 * len(results))
    grid = figure.subplots(len(results), len(panels), sharex="col", squeeze=False)
    for row, result in zip(grid, results, strict=True):
        for axes, (column, title) in zip(row, panels.items(), strict=True):
            values = result.curve[column]
            start = {"loss": values[0], "rewards/margins": 0.0, "rewards/accuracies": 0.5}[column]
            axes.axhline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot(result.curve["step"], values, color=result.colour, linewidth=1.5)
            axes.grid(True, axis="y")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", labelcolor=MUTED, labelsize=7.5)
            if column == "rewards/accuracies":
                axes.set_ylim(-0.05, 1.05)
                axes.set_yticks([0, 0.5, 1])
            if result is results[0]:
                axes.set_title(title)
            if result is results[-1]:
                axes.set_xlabel("step")
        row[0].set_ylabel(
            result.name, rotation=0, ha="right", va="center", color=INK, fontweight="bold"
        )
    figure.align_ylabels(grid[:, 0])
    return figure


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rows_of_runs(axes: Axes, results: Sequence[Result]) -> None:
    """One row a run, first on top, a rule behind each."""
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.grid(True)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # Laid out with matplotlib's font, read in the reader's own, which is narrower.
    path.write_text(path.read_text().replace(f"'{FIGURE_FONT}'", FONTS))


def inline(path: Path, name: str) -> Markup:
    """A figure as part of the page: the page's colours, its own names, no fixed size."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= )(id="|(?:xlink:)?href="#|clip-path="url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return Markup(text)


if __name__ == "__main__":
    main()
