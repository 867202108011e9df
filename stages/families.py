"""Which runs belong together: trainings of one objective, and objectives that differ in strength.

A family is what differs in `seed` alone: one objective, trained anew. A sweep is families that
differ in the strength of the pull to the reference alone, so that together they are one curve of
reward against KL.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

Row = Mapping[str, Any]

# What weighs the pull to the reference, by its place in a row of `runs`; best-of-N's is N.
STRENGTHS = ("beta", "tau", "target.beta", "best_of")


def families(runs: Mapping[str, Row]) -> dict[str, list[str]]:
    """Runs that differ in nothing but `seed`: names joined -> names."""
    found: dict[str, list[str]] = {}
    for name, row in runs.items():
        found.setdefault(_key(without(row, "seed")), []).append(name)
    return {" + ".join(names): names for names in found.values()}


def sweeps(runs: Mapping[str, Row]) -> dict[str, dict[str, list[str]]]:
    """Objective, in words -> its strength, in words -> the runs that train it.

    Strengths ascend; a run whose objective has none has the empty strength.
    """
    found: dict[str, list[tuple[float, str, list[str]]]] = {}
    for names in families(runs).values():
        row = runs[names[0]]
        objective = specification(without(row, "seed", *STRENGTHS)) or "best_of"
        said = {place: value for place in STRENGTHS if (value := at(row, place)) is not None}
        number = float(next(iter(said.values()), 0.0))
        words = specification(said)
        found.setdefault(objective, []).append((number, words, names))
    return {
        objective: {words: names for _, words, names in sorted(settings)}
        for objective, settings in found.items()
    }


def common_name(names: Sequence[str]) -> str:
    """What the runs of one family are called together: `dpo` of dpo_0 and dpo_1; else all names."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("_-.") or " + ".join(names)


def specification(row: Row) -> str:
    """A row in words: its loss, then each key with its value, `target.beta 0.1` where nested."""
    loss = [str(row["loss"])] if "loss" in row else []
    rest = {key: value for key, value in row.items() if key != "loss"}
    return ", ".join([*loss, *(f"{place} {value}" for place, value in _leaves(rest))])


def trained(row: Row, default_seed: int) -> str:
    """A key that two rows share if and only if they say the same training."""
    seed = row.get("seed")
    return _key({**row, "seed": default_seed if seed is None else seed})


def at(row: Row, place: str) -> Any:
    """The value at a place such as `target.beta`; None if there is none."""
    value: Any = row
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def put(row: Row, place: str, value: Any) -> dict[str, Any]:
    """The row with a value at a place such as `target.beta`.

    Raises:
        ValueError: if what should hold it is no mapping.
    """
    changed = copy.deepcopy(dict(row))
    *sections, key = place.split(".")
    node = changed
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(
                f"{place}: nothing can stand in '{section}', got {node!r}; name another place"
            )
    node[key] = value
    return changed


def without(row: Row, *places: str) -> dict[str, Any]:
    """The row without what stands at these places."""
    left = copy.deepcopy(dict(row))
    for place in places:
        *sections, key = place.split(".")
        holder = at(left, ".".join(sections)) if sections else left
        if isinstance(holder, dict):
            holder.pop(key, None)
    return left


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def _leaves(row: Row, within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _leaves(cast(Row, value), f"{within}{key}.")
        else:
            yield within + key, value
