"""The graph of what made what, as dvc.lock records it, and what a commit says is to be made.

Pure data: nothing here looks at an artefact's bytes. Digests are DVC's: the MD5 of a file; of a
directory, with the suffix `.dir`, that of the list of its files. Paths are those of dvc.yaml.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from flows import git
from flows.objects import Objects, folder_digest

if TYPE_CHECKING:
    from dvc.repo import Repo

CODE = (".py", ".jinja", ".css", ".js")


@dataclass(frozen=True)
class Stage:
    """A stage as it was run.

    Args:
        name: as DVC addresses it.
        command: what was run.
        params: "file:key" -> value.
        inputs: path -> digest, code included.
        outputs: path -> digest.
    """

    name: str
    command: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Lineage:
    """Stages by name; what made an input stands before what read it."""

    stages: Mapping[str, Stage]

    @cached_property
    def _maker(self) -> dict[str, str]:
        return {path: name for name, stage in self.stages.items() for path in stage.outputs}

    def makers_of(self, path: str) -> list[str]:
        """The stages that made a path: of a folder all that wrote into it, in their order."""
        above = [path, *_parents(path)]
        found = {self._maker[each] for each in above if each in self._maker}
        found |= {maker for made, maker in self._maker.items() if made.startswith(f"{path}/")}
        return [name for name in self.stages if name in found]

    def needs_of(self, name: str) -> list[str]:
        """The stages whose outputs a stage read."""
        found = {maker for path in self.stages[name].inputs for maker in self.makers_of(path)}
        return [other for other in self.stages if other in found]

    def readers_of(self, path: str) -> list[str]:
        """The stages that read a path, or a folder in which it lies, or something inside it."""
        above = {path, *_parents(path)}
        return [
            name
            for name, stage in self.stages.items()
            if any(read in above or read.startswith(f"{path}/") for read in stage.inputs)
        ]

    def upstream(self, names: Iterable[str]) -> list[str]:
        """These stages and all that theirs came from, back to the data; makers first."""
        return self._reach(names, {name: self.needs_of(name) for name in self.stages})

    def downstream(self, names: Iterable[str]) -> list[str]:
        """These stages and all that came of theirs."""
        next_of: dict[str, list[str]] = {name: [] for name in self.stages}
        for name in self.stages:
            for need in self.needs_of(name):
                next_of[need].append(name)
        return self._reach(names, next_of)

    def sources_of(self, name: str) -> dict[str, str]:
        """A stage's inputs that no stage made, raw data and code: path -> digest."""
        inputs = self.stages[name].inputs
        return {path: digest for path, digest in inputs.items() if not self.makers_of(path)}

    def data_of(self, name: str) -> dict[str, str]:
        """A stage's sources that are no code: raw data, base models, templates of prompts."""
        sources = self.sources_of(name)
        return {path: digest for path, digest in sources.items() if not path.endswith(CODE)}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Stage -> SHA-256 of all that it came from, back to the data, and of what it made."""
        found: dict[str, str] = {}
        for name, stage in self.stages.items():
            facts = {
                "command": stage.command,
                "params": dict(stage.params),
                "inputs": dict(stage.inputs),
                "outputs": dict(stage.outputs),
                "from": sorted(found[need] for need in self.needs_of(name)),
            }
            found[name] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return found

    def _reach(self, names: Iterable[str], edges: Mapping[str, list[str]]) -> list[str]:
        found, pending = set[str](), list(names)
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += edges[name]
        return [name for name in self.stages if name in found]


def read_lineage(lock: str) -> Lineage:
    """The lineage that the text of a dvc.lock records.

    Raises:
        ValueError: if stages need each other.
    """
    from dvc.utils.serialize import parse_yaml

    entries: dict[str, Any] = (parse_yaml(lock, git.LOCK) or {}).get("stages") or {}
    stages = {name: _stage(name, entry) for name, entry in entries.items()}
    unordered = Lineage(stages)
    needs = {name: unordered.needs_of(name) for name in stages}
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise ValueError(
            f"{git.LOCK}: its stages need each other, got {', '.join(error.args[1])}; "
            f"`git checkout {git.LOCK}`"
        ) from error
    return Lineage({name: stages[name] for name in order})


def _stage(name: str, entry: Mapping[str, Any]) -> Stage:
    return Stage(
        name,
        entry["cmd"],
        {
            f"{file}:{key}": value
            for file, values in entry.get("params", {}).items()
            for key, value in values.items()
        },
        digests_of(entry.get("deps", [])),
        digests_of(entry.get("outs", [])),
    )


def digests_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Path -> digest of what dvc.lock lists as `deps` or `outs` of a stage."""
    return {entry["path"]: entry[entry.get("hash", "md5")] for entry in entries}


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


@dataclass(frozen=True)
class Plan:
    """What dvc.yaml and params.yaml say of a stage: it has no digests of what stages make."""

    command: str
    params: Mapping[str, Any]
    inputs: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True)
class Snapshot:
    """A commit, or the working tree: its stages, and the digests of what none of them makes."""

    plans: Mapping[str, Plan]
    sources: Mapping[str, str]


def snapshot(repo: "Repo", revision: str | None) -> Snapshot:
    """What a commit says, None being the working tree; DVC resolves the templates of dvc.yaml.

    A source that is not there has no digest.

    Raises:
        ValueError: if there is no sound dvc.yaml.
    """
    from dvc.exceptions import DvcException
    from dvc.repo.brancher import switch

    try:
        if revision is None:
            return _snapshot(repo)
        with switch(repo, revision):
            return _snapshot(repo)
    except DvcException as error:
        raise ValueError(
            f"dvc.yaml: it cannot be read at {revision or 'the working tree'}, got {error}; "
            "name a revision of this pipeline"
        ) from error


def _snapshot(repo: "Repo") -> Snapshot:
    from dvc.dependency.param import ParamsDependency
    from dvc.stage import PipelineStage

    plans: dict[str, Plan] = {}
    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for stage in repo.index.stages:
        made = {_path(repo, out): out for out in stage.outs}
        if not isinstance(stage, PipelineStage):  # A .dvc file, which tracks data.
            inputs |= made
            continue
        read = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        named = {_path(repo, dep): dep for dep in read}
        params = {
            f"{_path(repo, dep)}:{key}": value
            for dep in stage.deps
            if isinstance(dep, ParamsDependency)
            for key, value in dep.read_params().items()
        }
        assert stage.name is not None
        plans[stage.name] = Plan(str(stage.cmd), params, frozenset(named), frozenset(made))
        outputs |= made
        inputs |= named
    made = Lineage({"": Stage("", "", {}, {}, dict.fromkeys(outputs, ""))})
    tracked = {
        path: entry.hash_info.value for path, entry in inputs.items() if entry.stage.is_data_source
    }
    objects = Objects(repo, deep=False)
    sources = {
        path: found
        for path, entry in inputs.items()
        if not made.makers_of(path)
        and (found := tracked.get(path) or _source_digest(path, entry, tracked, objects))
    }
    return Snapshot(plans, sources)


def _source_digest(
    path: str, entry: Any, tracked: Mapping[str, str], objects: Objects
) -> str | None:
    """Of a file or folder of the tree its bytes' digest; what .dvc files track in it counts too."""
    inside = {name: digest for name, digest in tracked.items() if name.startswith(f"{path}/")}
    if not inside:
        return entry.get_hash().value if entry.exists else None
    _, files = objects.at(path)
    for name, digest in inside.items():
        listed = objects.listed(digest)
        if listed is None:
            return None  # The cache lacks the list of a folder.
        where = name.removeprefix(f"{path}/")
        files |= {f"{where}/{each}".rstrip("/"): found for each, found in listed.items()}
    return folder_digest(files)


def _path(repo: "Repo", entry: Any) -> str:
    return entry.fs.relpath(entry.fs_path, repo.root_dir).replace("\\", "/")
