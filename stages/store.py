"""The store of reference log-probabilities: what some weights scored once is never scored again.

A record is one prompt with its completions, scored in a forward pass of its own, so that its
numbers do not depend on what else was scored. Records lie under a key of everything that can change
them; losses, betas, learning rates and seeds are no part of it.
"""

import array
import hashlib
import importlib.metadata
import itertools
import json
import os
import sqlite3
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from prefopt import attention
from prefopt.packing import Row
from stages import models
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    SFT,
    WORK,
    map_table,
    weights_digest,
)
from stages.params import Compute
from stages.rows import Rows

STORE = WORK / "reference"
WAIT = 60  # seconds for another process to end its writing
ENGINE = ("attention", "head", "packing", "scoring")

Logps = list[list[float]]  # of the completions of one prompt


def key_of(model: Path, compute: Compute) -> dict[str, str]:
    """Everything but token ids that a log-probability depends on."""
    engine = hashlib.sha256()
    for module in ENGINE:
        engine.update((Path(__file__).parents[1] / "prefopt" / f"{module}.py").read_bytes())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return {
        "weights": weights_digest(model),
        "dtype": compute.dtype,
        "threads": str(compute.num_threads),
        "engine": engine.hexdigest(),
        "backend": attention.backend(models.device()),
        "libraries": ", ".join(versions),
        "machine": f"{os.uname().machine} {sys.platform}",
    }


@dataclass(frozen=True)
class Group:
    """Completions of one prompt."""

    rows: list[Row]

    @property
    def digest(self) -> bytes:
        """Of the token ids, completions in their order."""
        completions = [list(row.completion) for row in self.rows]
        ids = json.dumps([list(self.rows[0].prompt), completions])
        return hashlib.sha256(ids.encode()).digest()


def grouped(rows: Iterable[Row]) -> Iterator[Group]:
    """Rows of one prompt that lie together, group by group in the order of the rows."""
    for _, members in itertools.groupby(rows, key=lambda row: row.prompt):
        yield Group(list(members))


class Store(AbstractContextManager["Store"]):
    """Records under one key: a file of SQLite, in which a record is whole or is not there.

    A file that is damaged is begun anew and a record that is damaged counts as missing, both with
    a warning.
    """

    def __init__(self, key: dict[str, str]) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.key, self.file = key, STORE / f"{name[:16]}.sqlite"
        self._database = _opened(self.file)
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO key VALUES (?, ?)", key.items())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()

    def __len__(self) -> int:
        return _num_records(self._database)

    def find(self, group: Group) -> Logps | None:
        """The record of a group, None if there is no sound one."""
        name = group.digest
        query = "SELECT logps, checksum FROM records WHERE digest = ?"
        found = self._database.execute(query, (name,)).fetchone()
        if found is None:
            return None
        stored, checksum = found
        if _checksum(name, stored) != checksum:
            message = f"{self.file}: record {name.hex()[:12]} is damaged; it is scored again"
            warnings.warn(message, stacklevel=2)
            return None
        logps = iter(array.array("f", stored))
        return [list(itertools.islice(logps, len(row.completion))) for row in group.rows]

    def add(self, groups: Iterable[Group], records: Iterable[Logps]) -> None:
        """Keep the records of groups: all of them, or none if this is interrupted."""
        with self._database:
            for group, logps in zip(groups, records, strict=True):
                name = group.digest
                stored = array.array("f", itertools.chain.from_iterable(logps)).tobytes()
                self._database.execute(
                    "INSERT OR REPLACE INTO records VALUES (?, ?, ?)",
                    (name, stored, _checksum(name, stored)),
                )


def _opened(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    damage = _damage(file)
    if damage:
        warnings.warn(f"{file}: {damage}; its records are scored again", stacklevel=3)
        file.unlink()
    database = sqlite3.connect(file, timeout=WAIT)
    with database:
        database.execute("CREATE TABLE IF NOT EXISTS key (part TEXT PRIMARY KEY, value TEXT)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS records (digest BLOB PRIMARY KEY, logps BLOB, checksum)"
        )
    return database


def _damage(file: Path) -> str:
    """What is wrong with a file of records; empty if nothing is."""
    try:
        with closing(sqlite3.connect(file, timeout=WAIT)) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        return str(error)
    return "" if verdict == "ok" else verdict


def _num_records(database: sqlite3.Connection) -> int:
    return database.execute("SELECT count(*) FROM records").fetchone()[0]


def _checksum(name: bytes, stored: bytes) -> int:
    return zlib.crc32(stored, zlib.crc32(name))


def explain(compute: Compute) -> str:
    """What of the present completions is stored for the present SFT policy, and why not."""
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    counts = {True: 0, False: 0}
    with Store(key_of(SFT, compute)) as store:
        for group in grouped(Rows(completions["prompt"], completions["completion"])):
            counts[store.find(group) is not None] += 1
    lines = [
        f"{SFT}: {counts[True]} of the {sum(counts.values())} prompts in {COMPLETIONS} are stored "
        f"under {store.file.stem}; {counts[False]} would be scored"
    ]
    for other in sorted(STORE.glob("*.sqlite")):
        with closing(_opened(other)) as database:
            key = dict(database.execute("SELECT part, value FROM key"))
            held = _num_records(database)
        differing = [part for part in store.key if key.get(part) != store.key[part]]
        if differing:
            lines.append(f"{other.stem} holds {held} prompts, for other {_listed(differing)}:")
            lines += [f"  {part}: {_short(key.get(part))}, now {_short(store.key[part])}"
                      for part in differing]  # fmt: skip
    return "\n".join(lines)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value[:12] if len(value) == 64 else value
