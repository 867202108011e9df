"""Records that leave the house: statements, a graph, a bill of materials; and models with them.

Nothing is recorded that an audit does not hold.
"""

import json
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows import signing
from flows.audit import ENVIRONMENT, Audit, audit, resolve
from flows.cards import card, examiners
from flows.exports import bill_of_materials, prov
from flows.git import text_at
from flows.objects import Objects
from flows.statements import FOLDER, Files, write_statements

if TYPE_CHECKING:
    from flows.signing import Signer  # pyright: ignore[reportPrivateImportUsage]

PROV = "prov.json"
BILL = "bom.cdx.json"
CARD = "README.md"


def provenance(target: str, folder: Path, *, sign: bool) -> Audit:
    """Write the records of all that a target came from.

    Args:
        target: as of an audit, in the working tree.
        folder: where to.
        sign: statements by the key of PREFOPT_SIGNING_KEY.

    Raises:
        ValueError: if there is no such target, or it does not audit clean, or there is no key.
    """
    by = signing.signer() if sign else None
    found = _vouched(target)
    with _files() as files:
        _write(found, files, folder, by)
    return found


def export(run: str, folder: Path, *, sign: bool) -> Audit:
    """Copy a run's model into a new folder, with its card and its records.

    The card is made here, from what evaluation found, and not where the model is trained: there it
    would be part of the model's digest, and every evaluation would make another model of it.

    Raises:
        ValueError: if it is no run that was evaluated, it does not audit clean, the folder is
            there already, or there is no key.
    """
    trained, evaluated = f"train@{run}", f"evaluate@{run}"
    if folder.exists():
        raise ValueError(f"{folder}: it is there already, got a folder to write; name a new one")
    if evaluated not in resolve("").lineage.stages:
        raise ValueError(f"{run}: no run that was evaluated, got nothing to export; `dvc repro`")
    by = signing.signer() if sign else None
    found = _vouched(evaluated, examiners(resolve("").lineage, run))
    lineage = found.lineage
    (model,) = (path for path in lineage.stages[trained].outputs if "/models/" in path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        partial = Path(scratch) / folder.name
        # Contents only: DVC's files may be read-only links into its cache.
        shutil.copytree(model, partial, copy_function=shutil.copyfile)
        with _files() as files:
            _write(found, files, partial / FOLDER, by)
            weights = files.of(model, lineage.stages[trained].outputs[model])
        (partial / CARD).write_text(card(lineage, run, found.commit, weights))
        partial.replace(folder)
    return found


def _vouched(target: str, also: Sequence[str] = ()) -> Audit:
    """An audit that holds; what statements of before say does not matter to those of now."""
    if resolve(target).revision is not None:
        raise ValueError(f"provenance: of the working tree alone, got '{target}'; check it out")
    found = audit(target, also=also, statements=False)
    if found.exit_code:
        raise ValueError(
            f"provenance: nothing is recorded that an audit does not hold, got {found.findings[0]}"
        )
    return found


@contextmanager
def _files() -> Generator[Files, None, None]:
    from dvc.repo import Repo

    with Repo(".") as repo:
        files = Files(Objects(repo, deep=False))
        yield files
        files.remember()


def _write(found: Audit, files: Files, folder: Path, by: "Signer | None") -> None:
    lineage, stages, commit = found.lineage, found.stages, found.commit
    write_statements(lineage, stages, commit, files, folder, by)
    packages = text_at(commit, ENVIRONMENT) or ""
    bill = bill_of_materials(lineage, stages, commit, packages, files)
    for name, tree in ((PROV, prov(lineage, stages, commit)), (BILL, bill)):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")
