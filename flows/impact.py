"""What a datum, a file or a commit has touched, forwards: all models and numbers made of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import git
from flows.differences import leaves
from flows.lineage import Lineage, read_lineage
from flows.programs import complaint, start


@dataclass(frozen=True)
class Impact:
    """What something touched.

    Args:
        what: it is, in words.
        rows: of the data, where it is a datum: identity, split, and how often it was used.
        stages: those that read it or came of it, makers first.
        outputs: what they made.
    """

    what: str
    rows: list[dict[str, Any]]
    stages: list[str]
    outputs: list[str]


def impact(written: str) -> Impact:
    """Find what a path, a commit, or a row of the data touched.

    Args:
        written: a path of the pipeline; a git revision; else `row:IDENTITY` or words of a text.

    Raises:
        ValueError: if it is none of these.
    """
    lock = Path(git.LOCK)
    if not lock.is_file():
        raise ValueError(f"{lock}: no such file, got no lineage; run `dvc repro`")
    lineage = read_lineage(lock.read_text())
    if makers := lineage.makers_of(written):
        return _of(f"artefact {written}", lineage, [*makers, *lineage.readers_of(written)])
    if readers := lineage.readers_of(written):
        return _of(f"source {written}", lineage, readers)
    if git.is_commit(written):
        return _of(f"commit {git.commit_of(written)}", lineage, _touched_by(written, lineage))
    rows = _traced(written)
    stages = {stage for row in rows for stage in row["stages"]}
    return _of(
        f"{len(rows)} rows of the data", lineage, [s for s in lineage.stages if s in stages], rows
    )


def _of(
    what: str, lineage: Lineage, first: list[str], rows: list[dict[str, Any]] | None = None
) -> Impact:
    stages = lineage.downstream(first)
    outputs = [path for name in stages for path in lineage.stages[name].outputs]
    return Impact(what, rows or [], stages, outputs)


def _touched_by(revision: str, lineage: Lineage) -> list[str]:
    """The stages that read a file or a parameter that a commit changed."""
    changed = git.files_changed_by(revision)
    found = {name for path in changed for name in lineage.readers_of(path)}
    files = {key.partition(":")[0] for stage in lineage.stages.values() for key in stage.params}
    for file in files.intersection(changed):
        values = [_values(f"{revision}^", file), _values(revision, file)]
        differing = {
            key for key in {*values[0], *values[1]} if values[0].get(key) != values[1].get(key)
        }
        found |= {
            name for name, stage in lineage.stages.items() if differing & set(leaves(stage.params))
        }
    return [name for name in lineage.stages if name in found]


def _values(revision: str, file: str) -> dict[str, Any]:
    from dvc.utils.serialize import parse_yaml

    tree = parse_yaml(git.text_at(revision, file) or "{}", file)
    return leaves({f"{file}:{key}": value for key, value in tree.items()})


def _traced(written: str) -> list[dict[str, Any]]:
    """Rows that hold these words, or have this identity, and the stages that used them."""
    program = start("traces", written)
    said, complained = program.communicate()
    if program.returncode:
        raise ValueError(complaint(complained).removeprefix("error: "))
    return json.loads(said)


def as_text(found: Impact) -> str:
    """All that was touched, for a person."""
    lines = [found.what]
    for row in found.rows:
        uses = ", ".join(f"{count} {what}" for what, count in row["uses"].items()) or "no use"
        lines.append(f"  {row['identity']}  {row['split']}, row {row['number']}: {uses}")
        lines.append(f"    {row['text']}")
    lines.append(f"touched {len(found.stages)} stages: {', '.join(found.stages) or 'none'}")
    for what, mark in (("models", "/models/"), ("numbers", "/metrics/")):
        paths = [path for path in found.outputs if mark in path]
        lines.append(f"{what}: {', '.join(paths) or 'none'}")
    return "\n".join(lines)
