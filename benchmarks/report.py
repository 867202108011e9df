"""The README's tables and its picture, from the results: `python -m benchmarks.report`.

Nothing in them is written by hand.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.meters import MIB
from stages.figures import INK, MUTED, STYLE_OF_FIGURES, new_figure, rows_of_runs, save
from stages.results import COLOURS

HERE = Path(__file__).parent
README = HERE / "README.md"
START, END = "<!-- from results/cpu.json -->\n", "<!-- to here -->\n"
MEMORY_START = "<!-- from results/memory-cpu.json -->\n"
SAMPLING_START = "<!-- from results/generation-cpu.json -->\n"
OURS = "packed"


@dataclass(frozen=True)
class Compared:
    """An arm's numbers in terms of ours, batch by batch.

    Args:
        median: of the ratios.
        low: the smallest.
        high: the largest.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def compared(table: dict[str, Any], arm: str, what: str) -> Compared:
    """`what` of an arm divided by ours of the same batch; NaN of what could not be measured."""
    theirs, own = table["arms"][arm][what], table["arms"][OURS][what]
    if None in theirs:
        return Compared(math.nan, math.nan, math.nan)
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    return Compared(median(ratios), min(ratios), max(ratios))


def tables(results: dict[str, Any]) -> str:
    """What the README says of the results, in Markdown."""
    return "\n".join([_machine(results), *(_table(table) for table in results["tables"])])


def memory_table(results: dict[str, Any]) -> str:
    """Peak memory of the stages by the number of training pairs, in Markdown."""
    sizes = list(results["pairs"])
    lines = [
        f"| | {' | '.join(f'{int(size):,} pairs' for size in sizes)} | most over least |",
        f"|---|{'---|' * len(sizes)}---|",
    ]
    for stage in results["pairs"][sizes[0]]:
        peaks = [results["pairs"][size].get(stage, {}).get("bytes") for size in sizes]
        known = [peak for peak in peaks if peak is not None]
        cells = ["not run" if peak is None else f"{peak / MIB:.0f} MiB" for peak in peaks]
        grown = f"{max(known) / min(known):.3f}" if len(known) > 1 else "\N{EN DASH}"
        lines.append(f"| {stage} | {' | '.join(cells)} | {grown} |")
    return "\n".join(lines) + "\n"


def _machine(results: dict[str, Any]) -> str:
    of = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    seconds = sum(table["seconds"] for table in results["tables"])
    peaks = [table["matmul_peak"] / 1e9 for table in results["tables"]]
    return (
        f"{of.get('accelerator', of['processor'])} ({of['instructions']}), {of['cores']} cores, "
        f"{of['threads']} thread; Python {of['python']}, {versions}; {results['compute_dtype']}. "
        f"Matrix products reached {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s beside the tables, "
        f"which took {seconds / 60:.0f} minutes in all.\n"
    )


def _table(table: dict[str, Any]) -> str:
    model = table["model"]
    rounds = len(table["useful_tokens"])
    lines = [
        f"### {table['title']}",
        "",
        f"{model['family'].capitalize()} of {model['parameters'] / 1e6:.1f}M parameters "
        f"(width {model['width']}, {model['layers']} layers, vocabulary {model['vocabulary']}), "
        f"{table['prompts']} prompts with {table['completions']} completions a batch, "
        f"{rounds} rounds, {round(median(table['useful_tokens']))} useful tokens a batch.",
        "",
        "| | CPU time, times ours | wall time, times ours | useful tokens/s | step memory, MiB "
        "| memory, times ours | token slots | MFU | EMFU |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(table, arm) for arm in table["arms"]),
        "",
    ]
    return "\n".join(lines)


def _row(table: dict[str, Any], arm: str) -> str:
    of = table["arms"][arm]
    seconds = sum(of["compute_seconds"])
    possible = seconds * table["matmul_peak"]
    cells = [
        of["title"],
        str(compared(table, arm, "compute_seconds")),
        f"{compared(table, arm, 'wall_seconds').median:.2f}",
        f"{sum(table['useful_tokens']) / seconds:.0f}",
        _mebibytes(of["memory_bytes"]),
        f"{compared(table, arm, 'memory_bytes').median:.2f}",
        f"{round(median(of['slots']))}",
        f"{sum(of['flop']) / possible:.0%}",
        f"{sum(table['necessary_flop']) / possible:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def sampling_tables(results: dict[str, Any]) -> str:
    """What the README says of sampling, in Markdown: tokens a second beside the first row's."""
    return "\n".join(_sampling_table(table) for table in results["tables"])


def _sampling_table(table: dict[str, Any]) -> str:
    rates = {
        name: [n / s for n, s in zip(of["tokens"], of["compute_seconds"], strict=True)]
        for name, of in table["samplers"].items()
    }
    first = next(iter(rates.values()))
    lines = [
        f"### Sampling: {table['title']}",
        "",
        f"{table['prompts']} prompts, up to {table['max_new_tokens']} new tokens, "
        f"{len(first)} rounds.",
        "",
        "| | tokens/s of CPU time | times the first |",
        "|---|---|---|",
    ]
    for name, rate in rates.items():
        ratios = [a / b for a, b in zip(rate, first, strict=True)]
        ratio = Compared(median(ratios), min(ratios), max(ratios))
        lines.append(f"| {name} | {median(rate):.0f} | {ratio} |")
    return "\n".join([*lines, ""])


def _mebibytes(sizes: Sequence[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{median(known) / MIB:.0f}" if known else "not measured"


def picture(results: dict[str, Any]) -> Figure:
    """Time and memory of every arm in terms of ours, one column a data set."""
    shown = [table for table in results["tables"] if len(table["arms"]) > 2]
    shown = [table for table in shown if table["title"].endswith("random order")]
    figure = new_figure(10.4, 4.2)
    rows = figure.subplots(2, len(shown), sharex="row", sharey=True, squeeze=False)
    units = {"compute_seconds": "CPU time, times ours", "memory_bytes": "memory, times ours"}
    for row, (what, unit) in zip(rows, units.items(), strict=True):
        for axes, table in zip(row, shown, strict=True):
            arms = list(table["arms"])
            rows_of_runs(axes, [])
            axes.set_yticks(range(len(arms)), [table["arms"][arm]["title"] for arm in arms])
            axes.set_ylim(len(arms) - 0.4, -0.6)
            axes.axvline(1, color=MUTED, linewidth=1)
            for place, arm in enumerate(arms):
                ratio = compared(table, arm, what)
                colour = INK if arm == OURS else COLOURS[0]
                axes.hlines(place, ratio.low, ratio.high, color=colour, linewidth=2)
                axes.plot(ratio.median, place, marker="o", color=colour)
                axes.annotate(
                    f"{ratio.median:.2f}", (ratio.median, place), (0, 5),
                    textcoords="offset points", ha="center", color=MUTED, fontsize=7.5,
                )  # fmt: skip
            axes.set_xlabel(unit)
        # The columns share their axes, whose limits must know all of them.
        row[0].set_xlim(left=0)
    for axes, table in zip(rows[0], shown, strict=True):
        axes.set_title(table["title"].partition(",")[0])
    return figure


def main() -> None:
    results = json.loads((HERE / "results/cpu.json").read_text())
    with rc_context(STYLE_OF_FIGURES):
        save(picture(results), HERE / "results/cpu.svg")
    memory = json.loads((HERE / "results/memory-cpu.json").read_text())
    sampling = json.loads((HERE / "results/generation-cpu.json").read_text())
    text = README.read_text()
    for start, written in (
        (START, tables(results)),
        (MEMORY_START, memory_table(memory)),
        (SAMPLING_START, sampling_tables(sampling)),
    ):
        between = re.compile(f"(?<={re.escape(start)}).*?(?={re.escape(END)})", re.DOTALL)
        text = between.sub(lambda _, written=written: written, text)
    README.write_text(text)


if __name__ == "__main__":
    main()
