"""The graph of `dvc.yaml`, as DVC itself sees it: order, dependencies, and what is out of date.

Only reads and reorders: what runs a stage is DVC's own command, a process for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Plan:
    """What `dvc repro` would look at."""

    order: tuple[str, ...]  # as a serial `dvc repro` goes through them
    needs: dict[str, frozenset[str]]  # the stages whose outputs a stage reads
    outdated: frozenset[str]  # changed, or downstream of what is
    locked: tuple[str, ...]  # the entries of dvc.lock, in their order

    def ready(self, waiting: Iterable[str], done: Iterable[str]) -> list[str]:
        """Those of the waiting, in order, whose outdated needs are all done."""
        wanted, missing = set(waiting), self.outdated.difference(done)
        return [name for name in self.order if name in wanted and not self.needs[name] & missing]


def read_plan() -> Plan:
    """Ask DVC, once, for the stages of ./dvc.yaml and their status; waits for DVC's lock."""
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with Repo(".", _wait_for_lock=True) as repo:
        graph = get_active_graph(repo.index.graph)
        stages = plan_repro(graph, collect_stages(repo, [PROJECT_FILE]))
        needs = {
            stage.addressing: frozenset(need.addressing for need in graph.successors(stage))
            for stage in stages
        }
        outdated = set(repo.status()) & set(needs)
    for name, wanted in needs.items():  # A stage comes after what it needs.
        if wanted & outdated:
            outdated.add(name)
    return Plan(tuple(needs), needs, frozenset(outdated), tuple(_locked()))


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


def restore_order(plan: Plan) -> None:
    """Put dvc.lock in the order that a serial `dvc repro` would have left.

    DVC appends a new entry when its stage ends, so the order is that of the ends. A serial run
    keeps the old entries where they were and appends the new ones as it goes through the plan.
    """
    from dvc.repo import Repo
    from dvc.utils.serialize import modify_yaml

    names = _locked()
    serial = _in_order(names, [*plan.locked, *plan.order])
    if names == serial:
        return
    with (
        Repo(".", _wait_for_lock=True) as repo,
        repo.lock,
        modify_yaml(LOCK, fs=repo.fs) as content,
    ):
        entries = content["stages"]
        for name in _in_order(list(entries), serial):
            entries[name] = entries.pop(name)


def _locked() -> list[str]:
    from dvc.utils.serialize import load_yaml

    return list(load_yaml(LOCK).get("stages", {})) if LOCK.exists() else []


def _in_order(names: Sequence[str], order: Sequence[str]) -> list[str]:
    """The names in the given order, and after them, as they stand, those that it lacks."""
    known = dict.fromkeys(name for name in order if name in names)
    return list(known | dict.fromkeys(names))
