"""The command `prefopt`: a thin front door. Each subcommand imports what it needs when called."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

TIMES = Path(".prefopt/times.jsonl")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def prefopt() -> None:
    """Declarative preference optimisation: from prompts and preferences to aligned policies."""


@app.command()
def repro(
    recipe: Annotated[str, typer.Option(help="lay recipes/NAME.yaml over params.yaml first")] = "",
) -> None:
    """Run what `dvc repro` finds to be out of date, then show the result table and the report."""
    if recipe:
        from stages.recipes import apply_recipe

        try:
            apply_recipe(recipe)
        except ValueError as error:
            sys.exit(str(error))
    times_before = _stage_times()
    dvc = _run(sys.executable, "-m", "dvc", "--wait-for-lock", "repro")
    if dvc.returncode == 0:
        _show_results(_stage_times()[len(times_before) :])
    # The trainings' own courier may still be on its way: this one waits for it.
    _run(sys.executable, "-m", "stages.tracking")
    sys.exit(dvc.returncode)


def _show_results(times: list[tuple[str, float]]) -> None:
    stamped = _run(sys.executable, "-m", "stages.report", "--publish", capture=True)
    if stamped.returncode != 0:
        sys.exit(stamped.stderr)
    if times:
        typer.echo("\nseconds a stage")
        for stage, seconds in times:
            typer.echo(f"{seconds:8.1f}  {stage}")
        typer.echo(f"{sum(seconds for _, seconds in times):8.1f}  in all, imports excluded")
    typer.echo("\n" + Path("artefacts/report/results.txt").read_text())
    typer.echo(f"report: {stamped.stdout.strip()}")


def _stage_times() -> list[tuple[str, float]]:
    if not TIMES.exists():
        return []
    rows = [json.loads(line) for line in TIMES.read_text().splitlines()]
    return [(row["stage"], row["seconds"]) for row in rows]


def _run(*command: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command with this interpreter's programs first on the path."""
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]}
    return subprocess.run(command, env=environment, text=True, capture_output=capture, check=False)


if __name__ == "__main__":
    app()
