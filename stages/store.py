"""The store of reference log-probabilities: what some weights scored once is never scored again.

A record is one prompt with all its completions, scored in a forward pass of its own, so that its
numbers do not depend on what else was scored. Records lie under a key of everything that can change
them; losses, betas, learning rates and seeds are no part of it.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.packing import Row
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    RECORDS_SCHEMA,
    SFT,
    WORK,
    digest,
    read_table,
    write_table,
)
from stages.params import Compute

STORE = WORK / "reference"
ENGINE = ("attention", "head", "packing", "scoring")

Logps = list[list[float]]  # of the completions of one prompt


def key_of(model: Path, compute: Compute) -> dict[str, str]:
    """Everything but token ids that a log-probability depends on."""
    weights = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors*"), model / "config.json"]):
        weights.update(f"{file.name} {digest(file)}\n".encode())
    engine = hashlib.sha256()
    for module in ENGINE:
        engine.update((Path(__file__).parents[1] / "prefopt" / f"{module}.py").read_bytes())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return {
        "weights": weights.hexdigest(),
        "dtype": compute.dtype,
        "threads": str(compute.num_threads),
        "engine": engine.hexdigest(),
        "libraries": ", ".join(versions),
        "machine": f"{os.uname().machine} {sys.platform}",
    }


@dataclass(frozen=True)
class Group:
    """All completions of one prompt, as numbers of rows."""

    rows: list[int]
    digest: str


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Rows by prompt, in the order in which prompts first occur."""
    members: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(tuple(row.prompt), []).append(number)
    return [
        Group(numbers, _identity(prompt, [rows[n].completion for n in numbers]))
        for prompt, numbers in members.items()
    ]


def _identity(prompt: Sequence[int], completions: Iterable[Sequence[int]]) -> str:
    ids = json.dumps([list(prompt), [list(completion) for completion in completions]])
    return hashlib.sha256(ids.encode()).hexdigest()


class Store:
    """Records under one key, in shards that appear whole or not at all."""

    def __init__(self, key: dict[str, str]) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.directory = STORE / name[:16]
        self.key = key

    def known(self) -> dict[str, Logps]:
        """Group's digest -> log-probabilities; a damaged shard is left out, with a warning."""
        found: dict[str, Logps] = {}
        for shard in sorted(self.directory.glob("*.parquet")):
            try:
                table = read_table(shard, RECORDS_SCHEMA)
            except ValueError as error:
                warnings.warn(f"{error}; its records are scored again", stacklevel=2)
                shard.unlink()
            else:
                found |= dict(zip(table["group"], table["logps"], strict=True))
        return found

    def add(self, records: dict[str, Logps]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "key.json").write_text(json.dumps(self.key, indent=2) + "\n")
        content = hashlib.sha256("".join(sorted(records)).encode()).hexdigest()
        partial = self.directory / "partial"
        columns = {"group": list(records), "logps": list(records.values())}
        write_table(partial, columns, RECORDS_SCHEMA)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.directory / f"{content[:16]}.parquet")


def explain(compute: Compute) -> str:
    """What of the present completions is stored for the present SFT policy, and why not."""
    completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    groups = grouped(list(map(Row, completions["prompt"], completions["completion"])))
    store = Store(key_of(SFT, compute))
    missing = [group for group in groups if group.digest not in store.known()]
    lines = [
        f"{SFT}: {len(groups) - len(missing)} of the {len(groups)} prompts in {COMPLETIONS} are "
        f"stored under {store.directory.name}; {len(missing)} would be scored"
    ]
    for other in sorted(STORE.glob("*/key.json")):
        key = json.loads(other.read_text())
        differing = [part for part in store.key if key.get(part) != store.key[part]]
        if differing:
            held = len(Store(key).known())
            lines.append(
                f"{other.parent.name} holds {held} prompts, for other {_listed(differing)}:"
            )
            lines += [f"  {part}: {_short(key.get(part))}, now {_short(store.key[part])}"
                      for part in differing]  # fmt: skip
    return "\n".join(lines)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value[:12] if len(value) == 64 else value
