"""Laws of the commands that answer questions: what they print, refuse and draw."""

import importlib.metadata
import os
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROJECT
from typer.testing import CliRunner, Result

from flows.cli import app
from prefopt.divergences import DIVERGENCES
from prefopt.explain import SYMBOLS, explain, explain_loss, losses_table, proofs_table
from prefopt.losses import LOSSES
from prefopt.losses.formulas import hyperparameters_of
from prefopt.proofs import Proof

every_loss = pytest.mark.parametrize("name", LOSSES)
SECTIONS = (
    "formula",
    "symbols",
    "gradient",
    "implicit reward",
    "at reference",
    "hyperparameters",
    "conventions",
    "optimum",
    "elsewhere",
)
# What needs no explanation.
PLAIN = {"log", "exp", "max", "min", "abs", "sign"}


def prefopt(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def joined(text: str) -> str:
    """Without the line breaks that wrapping put there."""
    return re.sub(r"\s+", " ", text)


def section(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    start = lines.index(title) + 1
    return [line.strip() for line in lines[start : lines.index("", start)]]


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


# prefopt losses


def test_the_table_of_losses_is_there_within_two_seconds_and_without_torch() -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = fresh(
        "import sys; from flows.cli import app; app(['losses'], standalone_mode=False); "
        "print(sorted({'torch', 'sympy', 'numpy'} & set(sys.modules)))"
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.stdout.splitlines()[-1] == "[]", finished.stderr
    # Seconds of computing: those of the clock depend on what else the machine does.
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 2


def test_the_table_of_losses_has_a_row_for_each_and_fits_a_wide_terminal() -> None:
    printed = prefopt("losses")
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert max(map(len, lines)) <= 140
    first_words = [line.split()[0] for line in lines if line and line[0] != " "]
    assert first_words[1 : 1 + len(LOSSES)] == list(LOSSES)


@every_loss
def test_a_row_of_the_table_says_what_the_loss_declares(name: str) -> None:
    loss = LOSSES[name]
    (row,) = (line for line in losses_table().splitlines() if line.split()[:1] == [name])
    cells = re.split(r"\s{2,}", row)
    reference, couples = ("yes" if answer else "no" for answer in (loss.reference, loss.couples))
    assert cells[1:5] == [loss.evidence, reference, loss.reads, couples]
    assert (loss.at_reference or "-").startswith(cells[5])
    assert loss.paper.startswith(cells[6])


# prefopt explain


@every_loss
def test_an_explanation_has_formula_papers_and_every_hyperparameter(name: str) -> None:
    printed = prefopt("explain", name)
    assert printed.exit_code == 0, printed.output
    text = joined(printed.stdout)
    loss = LOSSES[name]
    assert f"formula {loss.formula} " in text
    for paper in loss.paper.split("; "):
        assert f"https://arxiv.org/abs/{paper.split(', ')[-1]}" in text
    for hyperparameter, parameter in hyperparameters_of(loss).items():
        (line,) = (
            line
            for line in section(printed.stdout, "hyperparameters")
            if line.split()[0] == hyperparameter
        )
        default = parameter.default
        assert ("required" if default is parameter.empty else f"default {default:g}") in line
        # Something stands behind name, domain and default.
        assert len(re.split(r"\s{2,}", line)) == 3


@every_loss
def test_an_explanation_leaves_no_section_empty(name: str) -> None:
    lines = explain_loss(name).splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
    assert "  not said" not in lines
    assert max(map(len, lines)) <= 110


@every_loss
def test_every_symbol_of_a_formula_is_explained_once(name: str) -> None:
    loss = LOSSES[name]
    formulas = " ".join((loss.formula, loss.reward, loss.at_reference))
    used = set(re.findall(r"[A-Za-z_]\w*", formulas)) - PLAIN - set(hyperparameters_of(loss))
    explained = [line.split()[0] for line in section(explain_loss(name), "symbols")]
    explained = [symbol.removesuffix("(z)") for symbol in explained]
    assert used <= set(explained)
    assert len(explained) == len(set(explained))
    assert set(explained) <= set(SYMBOLS)


@pytest.mark.parametrize(
    ("name", "hyperparameter", "domain"),
    [
        ("dpo", "beta", "> 0, required"),
        ("dpo", "label_smoothing", "in [0, 0.5), default 0"),
        ("exo_pref", "label_smoothing", "in (0, 0.5), required"),
        ("ld_dpo", "alpha", "in [0, 1], required"),
        ("srpo", "alpha", "in (0, 1), required"),
        ("dpop", "penalty", ">= 0, required"),
        ("f_dpg", "floor", "< 0, default -50"),
        ("f_dpo", "divergence", "a divergence with f'(0+) = -inf, required"),
        ("f_po", "divergence", "a divergence, required"),
        ("psi_po", "psi", "a psi, required"),
    ],
)
def test_a_domain_is_printed_as_an_interval(name: str, hyperparameter: str, domain: str) -> None:
    lines = section(explain_loss(name), "hyperparameters")
    (found,) = (line for line in lines if line.split()[0] == hyperparameter)
    assert re.split(r"\s{2,}", found)[1] == domain


def test_a_gradient_is_sympys_where_no_docstring_writes_one() -> None:
    assert section(explain_loss("ipo"), "gradient") == ["dL/dh = 2*h - 1/tau"]
    assert section(explain_loss("dpo_rw"), "gradient") == ["dL/du_k = beta (q_k - p_k)"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_of_the_table_is_explained_under_its_name(name: str) -> None:
    row = DIVERGENCES[name]
    text = joined(explain(name))
    assert text.startswith(f"{name}: ")
    assert f" convex {'yes' if row.convex else 'no'}: " in text
    assert f" f'(0+) {row.slope_at_zero:.6g}: " in text
    assert f" DPO-inducing {'yes' if row.dpo_inducing else 'no'}: " in text
    assert f" displacement-resistant {'yes' if row.displacement_resistant else 'no'}: " in text


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("dpoo", "dpo"), ("exopref", "exo_pref"), ("squaredlog", "squared_log"), ("SimPO", "simpo")],
)
def test_an_unknown_name_fails_and_the_nearest_is_named(wrong: str, right: str) -> None:
    printed = prefopt("explain", wrong)
    assert printed.exit_code == 1
    assert printed.output.count("\n") == 1
    assert printed.output.startswith(f"no such loss or divergence, got '{wrong}'")
    assert printed.output.endswith(f"Did you mean '{right}'?\n")


def test_a_refusal_is_one_line_on_the_error_stream() -> None:
    finished = fresh("from flows.cli import app; app(['explain', 'dpoo'])")
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "Traceback" not in finished.stderr


def test_explaining_imports_neither_torch_nor_sympy_before_it_is_asked() -> None:
    finished = fresh(
        "import sys, prefopt.explain; print(sorted({'torch', 'sympy'} & set(sys.modules)))"
    )
    assert finished.stdout == "[]\n", finished.stderr


# prefopt divergence


def test_squared_log_is_classified_with_every_reason() -> None:
    printed = prefopt("divergence", "0.5*log(t)**2")
    assert printed.exit_code == 0
    text = joined(printed.stdout)
    for line in (
        "f(t) log(t)**2/2",
        "f'(t) log(t)/t",
        "score s(u) f'(e^u) - f'(1) = u*exp(-u) with u = log t",
        "convex no: f' falls: the score turns down at t = exp(1) [symbolic]",
        "DPO-inducing yes: f'(0+) = -inf, so no finite reward drives a probability to zero",
        "argmin f t = 1: f' is zero at t = 1, where f is smallest [symbolic]",
        "displacement-resistant yes: argmin f >= 1 (lemma 2). This is necessary, not sufficient",
        "f - f'(1) (t - 1), the same divergence, has the same argmin",
        "score's peak t = 2.71828, s = 0.367879: the score turns down at t = exp(1) [symbolic]",
        "implicit reward beta s(u), at most 0.367879 beta: reached at the peak [symbolic]",
        "score injective no: ",
        "usable in f_dpo, f_po, f_dpg",
        "g 0.1 0.5 1 2 5 10",
        "t 0.91277 0.70347 0.56714 0.4263 0.26534 0.17455",
    ):
        assert f" {line}" in text, line


def test_pearsons_is_classified_with_its_counter_example() -> None:
    text = joined(prefopt("divergence", "(t-1)**2").stdout)
    for line in (
        "convex yes: t f''(t) = 2*exp(u) with u = log t, which is never negative [symbolic]",
        "f'(0+) -2: f'(t) tends to -2 as t tends to 0 [symbolic]",
        "DPO-inducing no: f'(0+) = -2 is finite",
        "optimum at (0, 0, 1/3, 2/3): r_1 - r_2 = -.5, but beta (f'(t_1) - f'(t_2)) = 0",
        "usable in f_po, f_dpg; not in f_dpo, which needs f'(0+) = -inf",
        "t 0.95 0.75 0.5 0 0 0",
    ):
        assert f" {line}" in text, line


def test_the_caveat_of_the_written_form_is_printed_where_it_matters() -> None:
    kl = joined(explain("reverse_kl"))
    assert "a forced factor of 0.367879 (lemma 2)" in kl
    assert "has its argmin at t = 1 [numerical]: its verdict on displacement would be the" in kl
    forward = joined(explain("forward_kl"))
    assert "argmin f none: f falls for ever" in forward
    assert "t 10 2 1 0.5 0.2 0.1 a t above 1 is held down by the sum of probabilities" in forward


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("{alpha: 0.3}", "alpha(0.3)"),
        ("alpha(0.3)", "alpha(0.3)"),
        ("{squared_log: 0.5}", "squared_log(0.5)"),
        (" squared_log ", "squared_log"),
        ("-log(t)", "-log(t)"),
    ],
)
def test_a_divergence_is_written_as_in_params_or_as_it_is_printed(written: str, name: str) -> None:
    printed = prefopt("divergence", written)
    assert printed.exit_code == 0
    assert printed.stdout.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("{alpha: 1.5}", r"alpha must lie in \(0, 1\), got 1.5"),
        ("{squared_log: x}", "'squared_log' takes a number, got 'x' in '{squared_log: x}'"),
        ("sqared_log", "no such divergence, got 'sqared_log'.* Did you mean 'squared_log'?"),
        ("t*foo(t)", r"'foo' is not known here, got 'foo\(t\)' in 't\*foo\(t\)'"),
        ("2*t", r"f is linear in t"),
        ("t*log(t", "not a formula"),
        ("__import__('os')", "'__import__' is not known here"),
    ],
)
def test_what_is_no_divergence_is_refused_in_one_line(written: str, reason: str) -> None:
    printed = prefopt("divergence", written)
    assert printed.exit_code == 1
    assert printed.output.count("\n") == 1
    assert re.search(reason, printed.output)


@pytest.mark.parametrize("formula", ["0.5*log(t)**2", "(t-1)**2", "total_variation", "-t*log(t)"])
def test_a_picture_is_written_the_same_for_the_same_formula(formula: str, tmp_path: Path) -> None:
    pictures = [tmp_path / "a" / "f.svg", tmp_path / "b" / "f.svg"]
    for picture in pictures:
        printed = prefopt("divergence", formula, "--picture", str(picture))
        assert printed.exit_code == 0
        assert printed.stdout.endswith(f"picture: {picture}\n")
    assert "<svg" in pictures[0].read_text()
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_picture_is_an_svg_file(tmp_path: Path) -> None:
    printed = prefopt("divergence", "t*log(t)", "--picture", str(tmp_path / "f.png"))
    assert printed.exit_code == 1
    assert printed.output.startswith("--picture: an SVG file is drawn")
    assert not list(tmp_path.iterdir())


# prefopt verify-losses


def verify(only: str) -> Result:
    with warnings.catch_warnings():
        # TRL's own, where it is installed.
        warnings.simplefilter("ignore")
        return prefopt("verify-losses", "--only", only)


def test_the_proofs_of_a_loss_are_printed_as_a_table() -> None:
    printed = verify("dpo")
    assert printed.exit_code == 0
    text = joined(printed.stdout)
    assert " value is the formula " in text
    assert "FAILS" not in text
    assert re.search(r" (\d+) of \1 proofs hold, of \d+ cases", text)


def test_trl_stands_beside_our_losses_where_it_is_installed() -> None:
    text = joined(verify("ipo").stdout)
    try:
        release = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        assert "TRL is not installed" in text
    else:
        assert f" TRL {release.rpartition('.')[0]}: ipo, whose beta is tau" in text


def test_a_wrong_formula_fails_its_proof_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "ipo", replace(LOSSES["ipo"], formula="(h - 1/tau)**2"))
    printed = verify("ipo")
    assert printed.exit_code == 1
    assert "FAILS: ipo: value is the formula: " in printed.stdout


def test_a_loss_that_is_not_there_cannot_be_verified() -> None:
    printed = verify("dpoo")
    assert printed.exit_code == 1
    assert printed.output.startswith("no such loss, got 'dpoo'; known: dpo, ")
    assert printed.output.endswith(" Did you mean 'dpo'?\n")


def test_a_table_of_proofs_has_a_column_a_law_and_a_row_a_case() -> None:
    table = proofs_table(
        [
            Proof("a", "first", 0.0, 1e-9),
            Proof("a", "second", 2e-12, 1e-9),
            Proof("b", "second", 1.0, 1e-9),
            Proof("b", "TRL 1: theirs", 3e-8, 1e-6),
            Proof("c", "second", float("nan"), 1e-9),
        ]
    )
    assert [line.split() for line in table.splitlines() if line] == [
        ["loss", "1", "2"],
        ["a", "ok", "2e-12"],
        ["b", "FAILS"],
        ["c", "FAILS"],
        ["1", "first"],
        ["2", "second"],
        ["loss", "error", "beside"],
        ["b", "3e-08", "TRL", "1:", "theirs"],
        ["FAILS:", "b:", "second:", "1", ">", "1e-09"],
        ["FAILS:", "c:", "second:", "nan", ">", "1e-09"],
        ["3", "of", "5", "proofs", "hold,", "of", "3", "cases"],
    ]
