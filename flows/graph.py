"""The graph of `dvc.yaml`, as DVC itself sees it: order, dependencies, and what is out of date.

Only reads and reorders: what runs a stage is DVC's own command, a process for each.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.lineage import digests_of

if TYPE_CHECKING:
    from dvc.stage import Stage

LOCK = "dvc.lock"
MAX_RETRIES = 4


@dataclass(frozen=True)
class Demands:
    """What a stage's `meta` in dvc.yaml asks of those who run it; DVC does not hash it."""

    pool: str = "cpu"  # the work pool prefopt-POOL; `gpu` for a stage that asks for GPUs
    gpus: int = 0
    retries: int = 0  # further tries, at most 4, of a stage that may fail by chance


@dataclass(frozen=True)
class Plan:
    """What `dvc repro` would look at."""

    order: tuple[str, ...]  # as a serial `dvc repro` goes through them
    needs: dict[str, frozenset[str]]  # the stages whose outputs a stage reads
    outdated: frozenset[str]  # changed, or downstream of what is
    locked: tuple[str, ...]  # the entries of dvc.lock, in their order
    demands: dict[str, Demands]
    has_leftovers: bool  # of stages that are no more

    def ready(self, waiting: Iterable[str], done: Iterable[str]) -> list[str]:
        """Those of the waiting, in order, whose outdated needs are all done."""
        wanted, missing = set(waiting), self.outdated.difference(done)
        return [name for name in self.order if name in wanted and not self.needs[name] & missing]


def read_plan(root: Path, *, without_data: bool = False) -> Plan:
    """Ask DVC, once, for the stages of dvc.yaml and their status; waits for DVC's lock.

    Args:
        root: where dvc.yaml lies.
        without_data: outputs that are not there count as what dvc.lock says of them.
    """
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with Repo(str(root), _wait_for_lock=True) as repo:
        known = repo.index.stages  # DVC would collect them anew after it has told their status.
        graph = get_active_graph(repo.index.graph)
        # A path to dvc.yaml is taken from where we are.
        stages = plan_repro(graph, collect_stages(repo, [str(root / PROJECT_FILE)]))
        upstream = {stage: list(graph.successors(stage)) for stage in stages}
        if without_data:
            with repo.lock:
                addresses = {s.addressing for s in stages if s.changed(True, upstream[s])}
        else:
            addresses = set(repo.status())
        names = {stage: _name_of(stage, repo.root_dir) for stage in stages}
        outdated = {name for stage, name in names.items() if stage.addressing in addresses}
        needs = {
            names[stage]: frozenset(names[need] for need in upstream[stage]) for stage in stages
        }
        demands = {names[stage]: _demands(names[stage], stage.meta or {}) for stage in stages}
        entries = read_entries(root)
        left = bool(find_leftovers(root, known, entries))
    for name, wanted in needs.items():  # A stage comes after what it needs.
        if wanted & outdated:
            outdated.add(name)
    return Plan(tuple(needs), needs, frozenset(outdated), tuple(entries), demands, left)


def find_leftovers(
    root: Path, stages: Iterable["Stage"], entries: Mapping[str, Any]
) -> dict[str, str]:
    """What lies at a path that dvc.lock records as made, and no stage makes now.

    Args:
        root: where dvc.yaml lies.
        stages: all that DVC has now.
        entries: of dvc.lock.

    Returns:
        Path -> the digest that dvc.lock records.
    """
    here = root.resolve()
    made = [os.path.relpath(out.fs_path, here) for stage in stages for out in stage.outs]
    return {
        path: digest
        for entry in entries.values()
        for path, digest in digests_of(entry.get("outs", [])).items()
        if (root / path).exists() and not any(_overlap(path, other) for other in made)
    }


def stages_of_runs(
    stages: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[str], list[str]]:
    """What a new run means to the stages that dvc.yaml declares, by their names there.

    Returns:
        Those that are executed for it, those that are executed again because they read all runs,
        and those that it leaves as they are.
    """
    of_each, anew, kept = list[str](), list[str](), list[str]()
    for name, stage in stages.items():
        read = stage.get("params", [])
        if stage.get("foreach") == "${runs}":
            of_each.append(name)
        elif any(entry == "runs" or isinstance(entry, dict) for entry in read):
            anew.append(name)
        else:
            kept.append(name)
    return of_each, anew, kept


def restore_order(root: Path, plan: Plan) -> None:
    """Put dvc.lock in the order that a serial `dvc repro` would have left.

    DVC appends a new entry when its stage ends, so the order is that of the ends. A serial run
    keeps the old entries where they were and appends the new ones as it goes through the plan.
    """
    names = list(read_entries(root))
    serial = _in_order(names, [*plan.locked, *plan.order])
    if names != serial:
        _edit_entries(root, lambda entries: {name: entries[name] for name in serial})


def adopt_entry(root: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put what another workspace's dvc.lock says of a stage into this one's."""
    _edit_entries(root, lambda entries: {**entries, name: entry})


def read_entries(root: Path) -> dict[str, Any]:
    """What dvc.lock says of each stage, in its order."""
    from dvc.utils.serialize import load_yaml

    lock = root / LOCK
    return dict(load_yaml(str(lock)).get("stages", {})) if lock.exists() else {}


def parse_entries(text: str) -> dict[str, Any]:
    """What a dvc.lock, given as its text, says of each stage."""
    from dvc.utils.serialize import parse_yaml

    return parse_yaml(text, LOCK)["stages"]


def _edit_entries(root: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from dvc.repo import Repo
    from dvc.utils.serialize import modify_yaml

    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        if not (root / LOCK).exists():
            (root / LOCK).write_text("schema: '2.0'\n")
        with modify_yaml(str(root / LOCK), fs=repo.fs) as content:
            entries = edit(dict(content.get("stages", {})))
            content["stages"] = entries


def _name_of(stage: Any, root: str) -> str:
    """Its name in dvc.yaml; of data that `dvc add` tracks the path of the .dvc file.

    Not its address, which is a path from where we are.
    """
    from dvc.stage import PipelineStage

    if isinstance(stage, PipelineStage):
        return str(stage.name)
    return Path(stage.path).relative_to(root).as_posix()


def _demands(name: str, meta: Mapping[str, Any]) -> Demands:
    gpus, retries = meta.get("gpus", 0), meta.get("retries", 0)
    for key, value in {"gpus": gpus, "retries": retries}.items():
        if type(value) is not int or value < 0:
            raise ValueError(
                f"dvc.yaml: stage '{name}': meta.{key} is no count, got {value!r}; "
                "write 0, 1, 2, ..."
            )
    if retries > MAX_RETRIES:
        raise ValueError(
            f"dvc.yaml: stage '{name}': meta.retries is too large, got {retries}; "
            f"at most {MAX_RETRIES}"
        )
    return Demands(meta.get("pool", "gpu" if gpus else "cpu"), gpus, retries)


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are one, or one of them lies in the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _in_order(names: Sequence[str], order: Sequence[str]) -> list[str]:
    """The names in the given order, and after them, as they stand, those that it lacks."""
    known = dict.fromkeys(name for name in order if name in names)
    return list(known | dict.fromkeys(names))
