"""What differs between two results, in data, code, parameters and environment: the first causes.

A cause is something that no stage made and that two runs of a stage read otherwise. Whatever else
differs follows from causes; a stage whose all is the same but its outputs was run in another
environment, or on another machine.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flows import git
from flows.lineage import Lineage, read_lineage

Kind = Literal["data", "code", "parameter", "command", "stage", "environment", "machine"]
ENVIRONMENT = "requirements.lock"
NUM_LINES = 6  # of a text's difference, that are shown
SHORT = 12


@dataclass(frozen=True)
class Side:
    """One of the two: a lineage, and the texts of its sources as far as they are to be had."""

    name: str
    lineage: Lineage
    text_of: Callable[[str], str | None]


@dataclass
class Cause:
    """Something that differs and follows from nothing that differs.

    Args:
        kind: of what it is.
        what: a path, the dotted name of a parameter, a stage, a package.
        before: its value or digest in the first.
        after: in the second.
        stages: those that read it.
        changed: of these, those whose outputs differ.
        lines: of a text, how it differs.
    """

    kind: Kind
    what: str
    before: str
    after: str
    stages: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f"by {self.changed[0]}" if self.changed else "without effect"
        return f"{self.kind} {self.what}: {self.before} -> {self.after} ({where})"


@dataclass(frozen=True)
class Differences:
    """All causes, those with an effect first, in the order of the stages; and what changed."""

    causes: list[Cause]
    changed: list[str]
    num_stages: int

    @property
    def first(self) -> Cause | None:
        """The cause before all others; None if no output differs."""
        return next((cause for cause in self.causes if cause.changed), None)


def side(written: str) -> Side:
    """A git revision, a folder with a dvc.lock, or a lock file.

    Raises:
        ValueError: if it is none of these.
    """
    path = Path(written)
    lock = path / git.LOCK if path.is_dir() else path
    if lock.is_file():
        folder = lock.parent
        return Side(written, read_lineage(lock.read_text()), lambda name: _read(folder / name))
    text = git.text_at(git.commit_of(written), git.LOCK)
    if text is None:
        raise ValueError(
            f"{written}: a commit without {git.LOCK}, got nothing to compare; name a later one"
        )
    return Side(written, read_lineage(text), lambda name: git.text_at(written, name))


def _read(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.is_file() else None


def differences(first: Side, second: Side, stage: str = "") -> Differences:
    """Compare two results.

    Args:
        first: one.
        second: the other.
        stage: only what this stage came from; empty compares all.

    Raises:
        ValueError: if neither has such a stage.
    """
    names = list(dict.fromkeys([*second.lineage.stages, *first.lineage.stages]))
    if stage:
        if stage not in names:
            raise ValueError(f"--stage: no such stage, got '{stage}'; one of {', '.join(names)}")
        sides = (each.lineage for each in (first, second) if stage in each.lineage.stages)
        wanted = {name for lineage in sides for name in lineage.upstream([stage])}
        names = [name for name in names if name in wanted]
    changed = [name for name in names if _outputs(first, name) != _outputs(second, name)]
    causes: dict[tuple[Kind, str], Cause] = {}
    for name in names:
        found = list(_causes(first, second, name))
        if not found and name in changed and _same_inputs(first, second, name):
            found = _surroundings(first, second)
        for cause in found:
            kept = causes.setdefault((cause.kind, cause.what), cause)
            kept.stages.append(name)
            kept.changed += [name] if name in changed else []
    for cause in causes.values():
        if cause.kind in ("data", "code"):
            cause.lines += _lines(first.text_of(cause.what), second.text_of(cause.what))
    place = {name: number for number, name in enumerate(names)}

    def order(cause: Cause) -> tuple[bool, int]:
        return not cause.changed, place[(cause.changed or cause.stages)[0]]

    return Differences(sorted(causes.values(), key=order), changed, len(names))


def _outputs(each: Side, name: str) -> Mapping[str, str]:
    return each.lineage.stages[name].outputs if name in each.lineage.stages else {}


def _same_inputs(first: Side, second: Side, name: str) -> bool:
    return first.lineage.stages[name].inputs == second.lineage.stages[name].inputs


def _causes(first: Side, second: Side, name: str) -> Iterator[Cause]:
    """What a stage read otherwise, of what no stage made."""
    present = [name in each.lineage.stages for each in (first, second)]
    if not all(present):
        before, after = ("there" if there else "not there" for there in present)
        yield Cause("stage", name, before, after)
        return
    one, other = (each.lineage.stages[name] for each in (first, second))
    if one.command != other.command:
        yield Cause("command", name, one.command, other.command)
    for key, before, after in _differing(leaves(one.params), leaves(other.params)):
        yield Cause("parameter", key, before, after)
    sources = (each.lineage.sources_of(name) for each in (first, second))
    for path, before, after in _differing(*sources):
        kind = "code" if path.endswith(".py") else "data"
        yield Cause(kind, path, before[:SHORT], after[:SHORT])


def _surroundings(first: Side, second: Side) -> list[Cause]:
    """What is left where all that is recorded is the same."""
    texts = [each.text_of(ENVIRONMENT) for each in (first, second)]
    packages = (dict(_pins(text or "")) for text in texts)
    found = [
        Cause("environment", package, before, after)
        for package, before, after in _differing(*packages)
    ]
    return found or [Cause("machine", "hardware, or what no lock lists", "one", "another")]


def _pins(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        package, pinned, version = line.partition("==")
        if pinned:
            yield package, version


def _differing(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys([*first, *second]):
        if key not in first or key not in second or first[key] != second[key]:
            yield key, str(first.get(key, "nothing")), str(second.get(key, "nothing"))


def leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a stage by their full dotted names; "file:" is left out."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, each in value.items():
                walk(f"{name}.{key}", each)
        else:
            found[name] = value

    for key, value in params.items():
        walk(key.partition(":")[2], value)
    return found


def _lines(first: str | None, second: str | None) -> list[str]:
    if first is None or second is None:
        return []
    compared = difflib.unified_diff(first.splitlines(), second.splitlines(), n=0, lineterm="")
    found = [line for line in list(compared)[2:] if not line.startswith("@@")]
    more = [f"and {len(found) - NUM_LINES} lines more"] if len(found) > NUM_LINES else []
    return found[:NUM_LINES] + more


def as_text(found: Differences) -> str:
    """The first cause, the others, and what changed with them."""
    lines: list[str] = []
    for cause in found.causes:
        lines.append(f"{'first cause: ' if cause is found.first else ''}{cause}")
        lines += [f"    {line}" for line in cause.lines]
    listed: Sequence[str] = found.changed or ["none"]
    lines.append(
        f"outputs differ of {len(found.changed)} of {found.num_stages} stages: {', '.join(listed)}"
    )
    return "\n".join(lines)
