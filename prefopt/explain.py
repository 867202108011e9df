"""What people ask about losses and divergences, as plain text.

Everything printed is read where it is defined: the tables, the signatures and the docstrings'
sections, the formulas' derivatives, the classification of f, the proofs.
"""

import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from prefopt.losses import LOSSES, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.classification import Classification, Finding
    from prefopt.divergences import Divergence
    from prefopt.proofs import Proof

WIDTH = 100
GAP = "  "
GAPS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)

# What stands in formulas, rewards and derivatives, beside hyperparameters.
SYMBOLS = {
    "h": "u_w - u_l, the margin",
    "h_shared": "the margin of each side's first min(n_w, n_l) tokens",
    "u": "log pi(y|x)/pi_ref(y|x), the log-ratio of a completion, in nats",
    "u_q": "log q(y|x)/pi_ref(y|x), q the policy that drew the completion, in nats",
    "u_w": "log-ratio of the chosen completion: log pi/pi_ref, in nats",
    "u_l": "log-ratio of the rejected completion",
    "u_shared": "log-ratio of a completion's first min(n_w, n_l) tokens",
    "u_w_given_l": "log-ratio of the chosen, under the prompt that shows the rejected",
    "u_l_given_l": "log-ratio of the rejected, under the prompt that shows itself",
    "u_w_given_w": "log-ratio of the chosen, under the prompt that shows itself",
    "u_l_given_w": "log-ratio of the rejected, under the prompt that shows the chosen",
    "u_mismatched": "log-ratios of other prompts' completions; they carry no gradient",
    "logp": "log pi(y|x) of a completion, in nats",
    "logp_w": "log pi(y|x) of the chosen completion, in nats",
    "logp_l": "log pi(y|x) of the rejected completion, in nats",
    "logp_p": "log p(y|x), p the target",
    "logp_q": "log q(y|x), q the proposal that the completion was drawn from",
    "n": "tokens of a completion",
    "n_w": "tokens of the chosen completion",
    "n_l": "tokens of the rejected completion",
    "p": "P(chosen > rejected), by who labelled",
    "weight": "how likely the policy is to write both sides, in (0, 1]",
    "kl": "sum over a completion's positions of KL(pi_ref || pi) of the next token",
    "kl_w": "sum over the chosen's positions of KL(pi_ref || pi) of the next token",
    "kl_l": "sum over the rejected's positions of KL(pi_ref || pi) of the next token",
    "r": "reward of a completion, given by data",
    "k": "completions of a prompt",
    "q_k": "softmax(beta*u) of the prompt's completion k",
    "p_k": "softmax(r/temperature) of the prompt's completion k",
    "desirable": "1 for a desirable completion, 0 for an undesirable one",
    "baseline": "what is subtracted from pseudo-rewards",
    "sigmoid": "1/(1 + exp(-z))",
    "log_sigmoid": "log(sigmoid(z))",
    "log_odds": "log(P/(1 - P)) of P = exp(z)",
    "Heaviside": "1 where z > 0, 0 where z < 0",
    "sg": "z without its gradient",
    "score": "f'(e^z) - f'(1) of the divergence",
    "score'": "derivative of the score by z",
    "derivative": "f'(e^z) of the divergence",
    "f": "f(e^z) of the divergence",
    "psi": "the utility of a preference probability",
    "softmax": "over the prompt's k completions",
    "log_softmax": "log(softmax(z))",
    "sum": "over the prompt's k completions",
    "mean": "over the prompt's k completions",
}
IN_MICRO_BATCH = {"mean": "over the micro-batch", "sum": "over the micro-batch"}
# What the docstrings of one-liners leave unsaid.
USUAL = {
    "beta": "weight of the pull to the reference",
    "tau": "weight of the pull to the reference",
    "label_smoothing": "share of labels believed flipped",
}
COMPARED = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
SECTIONS = ("Args", "Gradient", "Optimum", "Elsewhere")


def explain(name: str) -> str:
    """A loss, a divergence of the table, or a formula for one.

    Raises:
        ValueError: if it is none of them, or a formula that is no generator.
    """
    if name in LOSSES:
        return explain_loss(name)
    from prefopt.divergences import DIVERGENCES

    if name in DIVERGENCES or not name.isidentifier():
        return explain_divergence(name)
    raise ValueError(
        f"no such loss or divergence, got '{name}'; `prefopt losses` lists the losses, divergences "
        f"are {', '.join(DIVERGENCES)}" + _did_you_mean(name, (*LOSSES, *DIVERGENCES))
    )


# Losses


def losses_table() -> str:
    """One row a loss: its conventions, its value at the reference, its paper."""
    header = ("loss", "evidence", "reference", "reads", "couples", "value at reference", "paper")
    rows = [
        (
            row.name,
            row.evidence,
            _yes(row.reference),
            row.reads,
            _yes(row.couples),
            row.at_reference or "-",
            row.paper.replace("; ", "\n"),
        )
        for row in LOSSES.values()
    ]
    return "\n".join(
        [
            *_table([header, *rows], widest=44),
            "",
            "reads: log-probabilities summed over tokens, or their mean; couples: whether examples "
            "of a micro-batch change each other's loss.",
        ]
    )


def rows_of(name: str) -> list[Loss]:
    """The row of that name; all of them for the empty name.

    Raises:
        ValueError: if there is none of that name.
    """
    if name and name not in LOSSES:
        known = ", ".join(LOSSES)
        raise ValueError(
            f"no such loss, got '{name}'; known: {known}" + _did_you_mean(name, LOSSES)
        )
    return [LOSSES[name]] if name else list(LOSSES.values())


def explain_loss(name: str) -> str:
    """All that is known of one loss.

    Raises:
        ValueError: if there is none of that name.
    """
    (loss,) = rows_of(name)
    summary, about, sections = _docstring(loss)
    # A gradient in words names its own symbols, but for those of lists.
    gradient = sections["Gradient"] or _gradient(loss)
    formulas = [loss.formula, loss.reward, loss.at_reference]
    formulas += re.findall(r"\b[pq]_k\b", " ".join(gradient)) if sections["Gradient"] else gradient
    parts = {
        "formula": _wrapped(loss.formula),
        "symbols": _columns(_symbols(loss, formulas)),
        "gradient": [line for text in gradient for line in _wrapped(text)],
        "implicit reward": [loss.reward or "none"],
        "at reference": [loss.at_reference or "not a constant"],
        "hyperparameters": _columns(_hyperparameters(loss, _entries(sections["Args"]))),
        "conventions": _columns(_conventions(loss)),
        "optimum": sections["Optimum"],
        "elsewhere": sections["Elsewhere"],
    }
    lines = [f"{name}: {summary}", *about, *(["", *_links(loss)])]
    for title, body in parts.items():
        lines += ["", title, *(f"  {line}".rstrip() for line in body or ["not said"])]
    return "\n".join(lines)


def _docstring(loss: Loss) -> tuple[str, list[str], dict[str, list[str]]]:
    """First line, the lines before the sections, and the lines of each section."""
    summary, *rest = (inspect.getdoc(loss.function) or "").splitlines()
    about: list[str] = []
    sections: dict[str, list[str]] = {title: [] for title in SECTIONS}
    body = about
    for line in rest:
        if line[:-1] in SECTIONS and line.endswith(":"):
            body = sections[line[:-1]]
        else:
            body.append(line.removeprefix("    "))
    return summary, _trimmed(about), {title: _trimmed(body) for title, body in sections.items()}


def _trimmed(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).strip().splitlines()


def _entries(lines: Sequence[str]) -> dict[str, str]:
    """`name: text` with its continuation lines, joined."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith(" "):
            found[name] += " " + line.strip()
        else:
            name, _, text = line.partition(": ")
            found[name] = text
    return found


def _gradient(loss: Loss) -> list[str]:
    """As sympy derives it."""
    from prefopt.losses.formulas import gradients

    return [f"dL/d{name} = {_plain(found)}" for name, found in gradients(loss).items()]


def _plain(expression: object) -> str:
    """Sympy's text, in the names that formulas are written with."""
    return re.sub(r"\b(Max|Min|Abs)\(", lambda found: found[0].lower(), str(expression))


def _symbols(loss: Loss, formulas: Iterable[str]) -> list[tuple[str, str]]:
    text = "\n".join(formulas)
    meaning = SYMBOLS | IN_MICRO_BATCH if loss.couples else SYMBOLS
    used = re.findall(r"([A-Za-z_]\w*'?)(\(?)", text)
    return [
        (f"{name}(z)" if (name, "(") in used else name, text)
        for name, text in meaning.items()
        if (name, "") in used or (name, "(") in used
    ]


def _hyperparameters(loss: Loss, meanings: dict[str, str]) -> list[tuple[str, str, str]]:
    from prefopt.losses.formulas import hyperparameters_of

    rows: list[tuple[str, str, str]] = []
    for name, parameter in hyperparameters_of(loss).items():
        needed = parameter.default is parameter.empty
        default = "required" if needed else f"default {parameter.default:g}"
        meaning = meanings.get(name, USUAL.get(name, "")).removesuffix(".")
        rows.append((name, f"{_domain(parameter.annotation)}, {default}", meaning))
    return rows or [("none", "", "")]


def _domain(annotation: Any) -> str:
    """Where values of an annotated type may lie."""
    kind, *bounds = get_args(annotation) or (annotation,)
    if kind is not float:
        return " with ".join([f"a {kind.__name__.lower()}", *bounds])
    limits = {
        name: value
        for bound in bounds
        for name, value in asdict(bound).items()
        if value is not None
    }
    match [(name, limits[name]) for name in COMPARED if name in limits]:
        case [(name, value)]:
            return f"{COMPARED[name]} {value:g}"
        case [(lower, low), (upper, high)]:
            opening, closing = "(" if lower == "gt" else "[", ")" if upper == "lt" else "]"
            return f"in {opening}{low:g}, {high:g}{closing}"
        case _:
            return "any number"


def _conventions(loss: Loss) -> list[tuple[str, str]]:
    from prefopt import batches

    described = inspect.getdoc(vars(batches)[loss.evidence]) or ""
    reads = {"sum": "summed", "mean": "averaged"}
    return [
        ("evidence", f"{loss.evidence}: {described.splitlines()[0]}"),
        ("log-probabilities", f"{reads[loss.reads]} over a completion's tokens"),
        ("reference", "read" if loss.reference else "not read"),
        (
            "micro-batch",
            "its examples change each other's loss: the result depends on its size"
            if loss.couples
            else "its examples do not change each other's loss",
        ),
    ]


def _links(loss: Loss) -> list[str]:
    """One line a paper, with its address."""
    papers = (paper.rpartition(", ") for paper in loss.paper.split("; "))
    return [f"{authors}, https://arxiv.org/abs/{number}" for authors, _, number in papers]


# Divergences


def explain_divergence(spec: str) -> str:
    """What follows from one f: of the table, `{alpha: a}`, `{squared_log: c}`, or a formula in t.

    Raises:
        ValueError: if there is no such divergence, or the formula is not a generator.
    """
    from prefopt.classification import classify

    written = written_divergence(spec)
    found = classify(written.expression)
    lines = [
        f"{written.name}: D_f(pi || pi_ref) = E f(t) over completions of pi_ref, t = pi/pi_ref",
        "",
        *_columns(
            [
                ("f(t)", _plain(found.f)),
                ("f'(t)", _plain(found.derivative)),
                ("score s(u)", f"f'(e^u) - f'(1) = {_plain(found.score)} with u = log t"),
            ]
        ),
        "",
        *_columns(_properties(found)),
        "",
        *_ratios(found.divergence),
    ]
    return "\n".join(lines)


def written_divergence(spec: str) -> "Divergence":
    """As `prefopt.divergences.divergence`, from text: `{alpha: 0.3}` and `alpha(0.3)` are one.

    Raises:
        ValueError: if there is no such divergence, or the formula is not a generator.
    """
    from prefopt.divergences import DIVERGENCES, divergence

    text = spec.strip()
    if text.isidentifier() and text not in {*DIVERGENCES, "t"}:
        raise ValueError(
            f"no such divergence, got '{text}'; known: {', '.join(DIVERGENCES)}, {{alpha: a}}, "
            "{squared_log: c}, or a formula for f in t such as '0.5*log(t)**2'"
            + _did_you_mean(text, DIVERGENCES)
        )
    parametrised = re.fullmatch(r"\{? *(alpha|squared_log) *[:(] *([^{}()]+)[)}]", text)
    if parametrised is None:
        return divergence(text)
    name, number = parametrised.groups()
    try:
        return divergence({name: float(number)})
    except ValueError as error:
        if str(error).startswith("could not convert"):
            raise ValueError(f"'{name}' takes a number, got '{number}' in '{spec}'") from None
        raise


def _properties(found: "Classification") -> list[tuple[str, str]]:
    divergence = found.divergence
    rows = [
        ("convex", f"{_yes(divergence.convex)}: {_known(found.convex)}"),
        ("f'(0+)", f"{_number(divergence.slope_at_zero)}: {_known(found.slope_at_zero)}"),
        ("DPO-inducing", _dpo_inducing(divergence)),
        ("argmin f", f"{_argmin(divergence)}: {_known(found.argmin)}"),
        ("displacement-resistant", _displacement(divergence)),
        ("written otherwise", _normalisation(found)),
        ("score's peak", _peak(found)),
        ("implicit reward", _reward(found)),
        ("score injective", f"{_yes(bool(found.injective.value))}: {_known(found.injective)}"),
        ("usable in", _usable(divergence)),
    ]
    at_one = _at(divergence.f, 0.0)
    if abs(at_one) > 1e-9:
        reason = "the reference's divergence from itself; f_po's value is not 0 where q = p"
        rows.insert(0, ("f(1)", f"{_number(at_one)}, not 0: {reason}"))
    return rows


def _at(function: Callable[["Tensor"], "Tensor"], u: float) -> float:
    import torch

    return function(torch.tensor(u, dtype=torch.float64)).item()


def _known(finding: "Finding") -> str:
    return f"{finding.reason} [{finding.how}]"


def _argmin(divergence: "Divergence") -> str:
    return "none" if math.isinf(divergence.argmin) else f"t = {_number(divergence.argmin)}"


def _dpo_inducing(divergence: "Divergence") -> str:
    if divergence.dpo_inducing:
        return "yes: f'(0+) = -inf, so no finite reward drives a probability to zero (corollary 1)"
    if divergence.slope_at_zero > 0 and math.isinf(divergence.slope_at_zero):
        return (
            "no: f'(0+) = inf, so that from a probability of zero no step upwards pays, at any "
            "finite reward, and optima may lie where probabilities are zero"
        )
    return (
        f"no: f'(0+) = {_number(divergence.slope_at_zero)} is finite, so some finite rewards have "
        "their optimum where probabilities are zero, and there reward differences are no longer "
        "beta times differences of f'. Pearson's (t - 1)^2 with reference (.4, .3, .2, .1), "
        "rewards (0, .5, 1, 2) and beta = .1 has its optimum at (0, 0, 1/3, 2/3): r_1 - r_2 = -.5, "
        "but beta (f'(t_1) - f'(t_2)) = 0"
    )


def _displacement(divergence: "Divergence") -> str:
    if divergence.displacement_resistant:
        return (
            "yes: argmin f >= 1 (lemma 2). This is necessary, not sufficient: chosen completions "
            "may still fall below the reference, only without a forced factor"
        )
    return (
        f"no: argmin f = c = {_number(divergence.argmin)} < 1, so that wherever a completion "
        "outside the data has a higher reward than all within, the optimum holds every completion "
        f"of the data below c pi_ref: a forced factor of {_number(divergence.argmin)} (lemma 2)"
    )


def _normalisation(found: "Classification") -> str:
    argmin, normalised = found.divergence.argmin, found.normalised_argmin
    if math.isclose(argmin, normalised, rel_tol=1e-5) or argmin == normalised:
        return "f - f'(1) (t - 1), the same divergence, has the same argmin"
    change = "the verdict on displacement stands"
    if (argmin >= 1) != (normalised >= 1):
        change = "its verdict on displacement would be the opposite: it belongs to the written form"
    return (
        "f - f'(1) (t - 1), the same divergence with the same score and f-DPO loss, has its argmin "
        f"at t = {_number(normalised)} [numerical]: {change}"
    )


def _peak(found: "Classification") -> str:
    how = f"[{found.peak.how}]"
    if found.peak.value == math.inf:
        return f"none: {found.peak.reason} {how}"
    warning = "where it falls, f-DPO lowers the chosen completion"
    if found.peak.value == -math.inf:
        return f"none: {found.peak.reason} {how}; {warning}"
    u = float(found.peak.value)
    where = f"t = {_number(math.exp(u))}, s = {_number(_at(found.divergence.score, u))}"
    return f"{where}: {found.peak.reason} {how}; {warning}"


def _reward(found: "Classification") -> str:
    ceiling = float(found.ceiling.value)
    if math.isinf(ceiling):
        return f"beta s(u), without upper bound: {_known(found.ceiling)}"
    return f"beta s(u), at most {_number(ceiling)} beta: {_known(found.ceiling)}"


def _usable(divergence: "Divergence") -> str:
    from prefopt.domains import DPOInducing
    from prefopt.losses.formulas import hyperparameters_of

    annotations = {
        name: {parameter.annotation for parameter in hyperparameters_of(loss).values()}
        for name, loss in LOSSES.items()
    }
    strict = [name for name, kinds in annotations.items() if DPOInducing in kinds]
    free = [name for name, kinds in annotations.items() if type(divergence) in kinds]
    if divergence.dpo_inducing:
        return ", ".join([*strict, *free])
    return f"{', '.join(free)}; not in {', '.join(strict)}, which needs f'(0+) = -inf"


def _ratios(divergence: "Divergence") -> list[str]:
    """The table of t at rewards of outsiders."""
    from prefopt.classification import ratio_against_outsider

    found = [ratio_against_outsider(divergence, gap) for gap in GAPS]
    lines = [
        *_wrapped(
            "t = pi/pi_ref of a completion of the data, at the optimum of lemma 2's problem, where "
            "a completion outside the data has a reward higher by g beta:"
        ),
        *_table([["g", *map(_number, GAPS)], ["t", *map(_significant, found)]], widest=WIDTH),
    ]
    if max(found) > 1:
        lines += ["a t above 1 is held down by the sum of probabilities"]
    return lines


# Proofs


def proofs_table(proofs: Iterable["Proof"]) -> str:
    """One row a case, one column a law; comparisons with TRL below, one row each."""
    proofs = list(proofs)
    ours = [proof for proof in proofs if not proof.law.startswith("TRL")]
    theirs = [proof for proof in proofs if proof.law.startswith("TRL")]
    lines: list[str] = []
    if ours:
        laws = list(dict.fromkeys(proof.law for proof in ours))
        verdicts = {(proof.case, proof.law): _verdict(proof) for proof in ours}
        rows = [
            (case, *(verdicts.get((case, law), "") for law in laws))
            for case in dict.fromkeys(proof.case for proof in ours)
        ]
        numbers = [str(number) for number in range(1, len(laws) + 1)]
        lines += _table([("loss", *numbers), *rows], widest=WIDTH)
        lines += ["", *(f"{number}  {law}" for number, law in zip(numbers, laws, strict=True)), ""]
    if theirs:
        rows = [(proof.case, _verdict(proof), proof.law) for proof in theirs]
        lines += [*_table([("loss", "error", "beside"), *rows], widest=WIDTH), ""]
    failures = [proof for proof in proofs if not proof.holds]
    lines += [f"FAILS: {p.case}: {p.law}: {p.error:.3g} > {p.tolerance:.3g}" for p in failures]
    cases = len({proof.case for proof in proofs})
    held = len(proofs) - len(failures)
    return "\n".join([*lines, f"{held} of {len(proofs)} proofs hold, of {cases} cases"])


def _verdict(proof: "Proof") -> str:
    """The error, `ok` where violations are counted or there is none."""
    if not proof.holds:
        return "FAILS"
    return "ok" if proof.error == 0 else f"{proof.error:.0e}"


# Text


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _number(x: float) -> str:
    return f"{x:.6g}"


def _significant(x: float) -> str:
    return f"{x:.5g}"


def _wrapped(text: str, width: int = WIDTH - 2) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the last of them wrapped."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    indent = sum(width + len(GAP) for width in widths)
    lines: list[str] = []
    for *cells, text in rows:
        head = GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + GAP
        body = textwrap.wrap(
            text, WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False
        )
        lines += [(head + (body[0] if body else "")).rstrip()]
        lines += [" " * indent + line for line in body[1:]]
    return lines


def _table(rows: Sequence[Sequence[str]], widest: int) -> list[str]:
    """Aligned columns; cells are wrapped at `widest` characters and at their line breaks."""
    cells = [
        [
            [
                piece
                for line in cell.splitlines() or [""]
                for piece in textwrap.wrap(line, widest, break_long_words=False) or [""]
            ]
            for cell in row
        ]
        for row in rows
    ]
    widths = [
        max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)
    ]
    lines: list[str] = []
    for row in cells:
        for height in range(max(map(len, row))):
            pieces = (cell[height] if height < len(cell) else "" for cell in row)
            padded = (piece.ljust(width) for piece, width in zip(pieces, widths, strict=True))
            lines.append(GAP.join(padded).rstrip())
    return lines
