"""The command `prefopt`: a thin front door. Each subcommand imports what it needs when called."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

Answer = TypeVar("Answer")

# Of commands that take a formula: one may begin with a minus.
FORMULAS = {"ignore_unknown_options": True}
DVC = Path("dvc.yaml")
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

        _or_exit(lambda: apply_recipe(recipe))
    times_before = _stage_times()
    status = dvc_repro()
    if status == 0:
        _show_results(_stage_times()[len(times_before) :])
    # The trainings' own courier may still be on its way: this one waits for it.
    _run(sys.executable, "-m", "stages.tracking")
    sys.exit(status)


def dvc_repro() -> int:
    """Run `dvc repro` in this workspace, which nobody else's run is at work in; its exit status."""
    from flows.leftovers import remove_leftovers
    from flows.locks import hold_workspace
    from flows.supervise import Supervisor

    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro"]
    with hold_workspace(Path(), typer.echo) as lock, Supervisor([lock]) as supervisor:
        remove_leftovers(Path(), typer.echo)
        return supervisor.start(command, _environment(), None).wait()


@app.command()
def deploy(
    api: Annotated[int, typer.Option(min=1, help="stages at once that ask judges' APIs")] = 4,
) -> None:
    """Make the work pools and deployments of prefect.yaml at the server of PREFECT_API_URL."""
    from flows.cluster import deploy

    _or_exit(lambda: deploy(api))


@app.command()
def worker(
    pool: Annotated[str, typer.Argument(help="cpu, gpu, api, or retrain", metavar="POOL")],
    clone: Annotated[
        Path | None,
        typer.Option(help="where it works, made if it is not there; rounds have none"),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="stages at the same time")] = 1,
) -> None:
    """Run stages that a coordinator sends to a pool; CUDA_VISIBLE_DEVICES says with which GPUs.

    The pool retrain has rounds of retraining, in the repository where `prefopt deploy` was given.
    """
    from flows.cluster import work

    _or_exit(lambda: work(pool, clone, at_once))


@app.command()
def cluster() -> None:
    """Start a Prefect server and two workers on this machine, to try the pools; Ctrl-C ends all."""
    from flows.cluster import try_out

    try_out(typer.echo)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a run to vary, or a loss", metavar="NAME")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say it, write nothing")] = False,
) -> None:
    """Write rows into `runs` of params.yaml: prefopt sweep dpo --beta 0.03,0.1 --seed 0,1,2.

    Options are keys of the row (target.beta is beta within target), each with values between
    commas; every combination is a row. All are checked before any is written.
    """
    from flows.graph import stages_of_runs
    from stages.params import read_yaml
    from stages.sweep import plan, read_options

    found = _or_exit(lambda: plan(name, read_options(context.args)))
    if not dry_run:
        found.write()
    for line in found.lines:
        typer.echo(f"  {line}")
    for row, run in found.there.items():
        typer.echo(f"  {row} is not written: run {run} is that training")
    trainings = "1 training" if len(found.new) == 1 else f"{len(found.new)} trainings"
    written = "would be written" if dry_run else "written to params.yaml"
    typer.echo(f"\n{trainings} {written}; {len(found.there)} of the sweep were there.")
    if found.new:
        of_each, anew, kept = stages_of_runs(read_yaml(DVC)["stages"])
        typer.echo(f"`dvc repro` computes, of each new run: {', '.join(of_each)}")
        typer.echo(f"                         once again: {', '.join(anew)}")
        typer.echo(f"It does not compute again: {', '.join(kept)}, nor any other run.")


@app.command()
def losses() -> None:
    """List every loss: its evidence, its conventions, its value at the reference, its paper."""
    from prefopt.explain import losses_table

    typer.echo(losses_table())


@app.command(context_settings=FORMULAS)
def explain(
    name: Annotated[str, typer.Argument(help="a loss, or a divergence", metavar="NAME")],
) -> None:
    """Say what a loss computes: formula, gradient, optimum, and what others call it."""
    from prefopt import explain

    typer.echo(_or_exit(lambda: explain.explain(name)))


@app.command(context_settings=FORMULAS)
def divergence(
    formula: Annotated[
        str, typer.Argument(help="f(t), such as '0.5*log(t)**2', or a name", metavar="EXPR")
    ],
    picture: Annotated[
        Path | None, typer.Option(help="draw f, f' and the score into this SVG file")
    ] = None,
) -> None:
    """Classify an f-divergence: convex, DPO-inducing, displacement-resistant, and why."""
    from prefopt import explain

    if picture is not None and picture.suffix != ".svg":
        sys.exit(f"--picture: an SVG file is drawn, got '{picture}'; let its name end in .svg")
    typer.echo(_or_exit(lambda: explain.explain_divergence(formula)))
    if picture is not None:
        from prefopt.classification import curves
        from stages.figures import divergence_figure

        written = explain.written_divergence(formula)
        picture.parent.mkdir(parents=True, exist_ok=True)
        divergence_figure(written.expression, curves(written), picture)
        typer.echo(f"\npicture: {picture}")


@app.command()
def verify_losses(
    only: Annotated[str, typer.Option(help="one loss", metavar="NAME")] = "",
) -> None:
    """Prove every law of every loss on this machine; where TRL is installed, compare with it."""
    from tqdm import tqdm

    from prefopt.explain import proofs_table, rows_of
    from prefopt.proofs import Proof, proofs

    rows = _or_exit(lambda: rows_of(only))
    found: list[Proof] = []
    for row in tqdm(rows, desc="proofs", unit="loss"):
        found += proofs(row)
    if _is_installed("trl"):
        from stages.oracle import COMPARISONS, side_by_side

        names = {row.name for row in rows}
        compared = [comparison for comparison in COMPARISONS if comparison.loss in names]
        found += tqdm(side_by_side(compared), total=len(compared), desc="beside TRL", unit="case")
        typer.echo(proofs_table(found))
    else:
        typer.echo(proofs_table(found))
        typer.echo("TRL is not installed, so that nothing was compared with it")
    sys.exit(0 if all(proof.holds for proof in found) else 1)


@app.command()
def power(
    effect: Annotated[
        float, typer.Option(help="a win rate above one half, or a difference")
    ] = 0.05,
    prompts: Annotated[int, typer.Option(help="say what so many can see; 0: none given")] = 0,
    ties: Annotated[float, typer.Option(help="share of the verdicts")] = 0.0,
    power: Annotated[float, typer.Option(help="probability of seeing the effect")] = 0.8,
    alpha: Annotated[float, typer.Option(help="two-sided level of significance")] = 0.05,
    paired: Annotated[bool, typer.Option("--paired", help="compare two runs")] = False,
    correlation: Annotated[float, typer.Option(help="of their points on a prompt")] = 0.3,
    rate: Annotated[float, typer.Option(help="the weaker run's win rate")] = 0.5,
) -> None:
    """Say how many prompts an evaluation needs, and what it can see."""
    from prefopt.statistics.power import Design, report

    def answer() -> str:
        design = Design(ties, alpha, power, correlation if paired else None, rate)
        return report(effect, design, [prompts] if prompts else [])

    typer.echo(_or_exit(answer))


@app.command()
def serve_judge(
    model: Annotated[str, typer.Argument(help="a causal LM: folder or hub id", metavar="MODEL")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="other counts give other bits")] = 1,
) -> None:
    """Serve a local model as a judge: OpenAI's chat completions on the loopback, without a key."""
    from stages.serve_judge import serve

    if dtype not in ("float32", "bfloat16"):
        sys.exit(f"--dtype: no such dtype, got '{dtype}'; float32 or bfloat16")
    _or_exit(lambda: serve(model, port=port, dtype=dtype, num_threads=threads, ready=typer.echo))


@app.command()
def judges() -> None:
    """Say what each judge is, what endpoints have still to answer, and all report cards."""
    from stages.cards import described_cards
    from stages.judge import estimates

    typer.echo(_or_exit(estimates))
    if cards := _or_exit(described_cards):
        typer.echo(f"\n{cards}")


@app.command()
def serve(
    server: Annotated[str, typer.Argument(help="prefect or mlflow", metavar="SERVER")],
    host: Annotated[str, typer.Option(help="wider than the loopback only with a password")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="else 4200 or 5000")] = None,
) -> None:
    """Become the Prefect or the MLflow server of a team, with its settings from the environment."""
    from flows.serve import serve

    _or_exit(lambda: serve(server, host, port))


@app.command()
def notify() -> None:
    """Have Prefect tell the webhook of PREFOPT_WEBHOOK_URL of every flow's run that ends badly."""
    from flows.notify import notify

    typer.echo(_or_exit(notify))


@app.command()
def retrain(
    revision: Annotated[str, typer.Option(help="whose code and parameters")] = "HEAD",
    branch: Annotated[str, typer.Option(help="where rounds are kept")] = "retrain",
    concurrency: Annotated[int, typer.Option(min=1, help="stages at once")] = 2,
    pools: Annotated[bool, typer.Option("--pools", help="by workers, not on this machine")] = False,
) -> None:
    """Train on the data of `retrain.source`, and promote what beats the champion: 0; else 1."""
    from flows.server import connected

    # A plain SIGTERM would skip the ends of the `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with connected():
        # Here, because Prefect reads its settings when it is imported.
        from flows.retrain import retrain

        state = retrain(".", revision, branch, concurrency, pools=pools, return_state=True)
    typer.echo(state.message)
    sys.exit(0 if state.name in ("Completed", "Skipped", "CaughtUp") else 1)


@app.command()
def rollback() -> None:
    """Make the previous champion of MLflow's registry the champion again."""
    from flows.programs import ask

    held = _or_exit(lambda: ask(Path(), "registry", "rollback"))
    typer.echo(f"champion of {held['name']}: version {held['champion']['version']}")


@app.command()
def status() -> None:
    """Say what is up to date, running, failed or stale, why, and which command repairs it."""
    from flows.status import report

    typer.echo(_or_exit(report))


@app.command()
def audit(
    target: Annotated[
        str,
        typer.Argument(
            help="a stage, run, path, git revision, MLflow run or models:/NAME@ALIAS; else all"
        ),
    ] = "",
    deep: Annotated[bool, typer.Option("--deep", help="read every byte again")] = False,
    replay: Annotated[
        list[str] | None, typer.Option(help="run again: all, a number of stages, or a stage")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    picture: Annotated[
        list[Path] | None, typer.Option(help="draw it: a page FILE.html, or FILE.svg")
    ] = None,
) -> None:
    """Say where models and numbers came from, and verify it: 0 holds, 1 fails, 2 cannot tell."""
    from flows import audit

    if wrong := [path for path in picture or () if path.suffix not in (".html", ".svg")]:
        sys.exit(f"--picture: a page or an SVG is drawn, got '{wrong[0]}'; end it in .html or .svg")

    def say(name: str) -> None:
        typer.echo(f"replaying {name}", err=True)

    found = _or_exit(lambda: audit.audit(target, deep=deep, replays=replay or (), say=say), code=2)
    typer.echo(audit.as_json(found) if as_json else audit.as_text(found))
    for path in picture or ():
        from flows.picture import as_page, as_svg

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_page(found) if path.suffix == ".html" else as_svg(found))
    sys.exit(found.exit_code)


@app.command()
def provenance(
    target: Annotated[str, typer.Argument(help="as of audit, in the working tree; else all")] = "",
    out: Annotated[Path, typer.Option(help="a folder")] = Path("provenance"),
    sign: Annotated[bool, typer.Option("--sign", help="by the key of PREFOPT_SIGNING_KEY")] = False,
) -> None:
    """Write statements (in-toto, SLSA), a graph (W3C PROV) and a bill of materials (CycloneDX)."""
    from flows.provenance import provenance

    found = _or_exit(lambda: provenance(target, out, sign=sign))
    typer.echo(f"{out}: {len(found.stages)} statements of commit {found.commit}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="that was evaluated")],
    folder: Annotated[Path, typer.Argument(help="a new one")],
    sign: Annotated[bool, typer.Option("--sign", help="by the key of PREFOPT_SIGNING_KEY")] = False,
) -> None:
    """Copy a run's model with its card and its records, to hand it on."""
    from flows.provenance import export

    found = _or_exit(lambda: export(run, folder, sign=sign))
    typer.echo(f"{folder}: {run} of commit {found.commit}")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="a git revision, a folder or a dvc.lock")],
    second: Annotated[str, typer.Argument(help="another")],
    stage: Annotated[str, typer.Option(help="only what this stage came from")] = "",
) -> None:
    """Say what differs between two results, down to the first cause: 0 nothing, 1 something."""
    from flows import differences

    sides = _or_exit(lambda: (differences.side(first), differences.side(second)), code=2)
    found = _or_exit(lambda: differences.differences(*sides, stage), code=2)
    typer.echo(differences.as_text(found))
    sys.exit(1 if found.causes or found.changed else 0)


@app.command()
def impact(
    what: Annotated[str, typer.Argument(help="a path, a git revision, row:IDENTITY, or words")],
) -> None:
    """List every model and number that a datum, a file or a commit touched."""
    from flows import impact

    typer.echo(impact.as_text(_or_exit(lambda: impact.impact(what))))


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _or_exit(answer: Callable[[], Answer], code: int = 1) -> Answer:
    """The answer; of what a person wrote wrongly, one line and an exit code."""
    try:
        return answer()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(code)


cache = typer.Typer(no_args_is_help=True, help="What was computed once and is kept.")
app.add_typer(cache, name="cache")


@cache.command("explain")
def cache_explain() -> None:
    """Say which reference log-probabilities are stored, and what of their key made a miss."""
    from stages.params import load_params
    from stages.store import explain

    try:
        typer.echo(explain(load_params().compute))
    except ValueError as error:
        sys.exit(f"error: {error}")


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
    return subprocess.run(
        command, env=_environment(), text=True, capture_output=capture, check=False
    )


def _environment() -> dict[str, str]:
    """Ours, with this interpreter's programs first on the path."""
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]}


if __name__ == "__main__":
    app()
