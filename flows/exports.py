"""The lineage in others' words: a graph of W3C PROV, and a bill of materials of CycloneDX.

Both follow from the lineage alone: no time and no machine is in them.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flows.evaluations import Rate, rates
from flows.lineage import Lineage
from flows.statements import File, Files

NAMESPACE = "urn:prefopt:"
WEIGHTS = ".safetensors"


def prov(lineage: Lineage, stages: Sequence[str], commit: str) -> dict[str, Any]:
    """Stages as activities, artefacts and code as entities, in PROV-JSON.

    A folder that several stages wrote into, or of which one was read in part, is a collection.
    """
    entities: dict[str, dict[str, Any]] = {}
    activities: dict[str, dict[str, Any]] = {}
    used: list[dict[str, str]] = []
    generated: list[dict[str, str]] = []
    members: dict[tuple[str, str], dict[str, str]] = {}

    def entity(path: str, digest: str) -> str:
        name = f"path:{path}"
        entities[name] = {"prov:label": path, "prefopt:md5": digest}
        return name

    for name in stages:
        stage = lineage.stages[name]
        activity = f"stage:{name}"
        activities[activity] = {"prov:label": name, "prefopt:command": stage.command}
        for path, digest in stage.outputs.items():
            made = {"prov:entity": entity(path, digest), "prov:activity": activity}
            generated.append(made)
        for path, digest in stage.inputs.items():
            read = entity(path, digest)
            used.append({"prov:activity": activity, "prov:entity": read})
            for whole, part in _parts(lineage, path):
                pair = {"prov:collection": f"path:{whole}", "prov:entity": f"path:{part}"}
                members[whole, part] = pair
    for whole, _ in members:
        entities.setdefault(f"path:{whole}", {"prov:label": whole})
        entities[f"path:{whole}"]["prov:type"] = {
            "$": "prov:Collection",
            "type": "prov:QUALIFIED_NAME",
        }
    agent = "prefopt:dvc"
    plan = f"git:{commit}"
    entities[plan] = {"prov:type": {"$": "prov:Plan", "type": "prov:QUALIFIED_NAME"}}
    return {
        "prefix": {
            "prefopt": NAMESPACE,
            "stage": f"{NAMESPACE}stage:",
            "path": f"{NAMESPACE}path:",
            "git": "urn:git:commit:",
        },
        "agent": {agent: {"prov:type": {"$": "prov:SoftwareAgent", "type": "prov:QUALIFIED_NAME"}}},
        "entity": entities,
        "activity": activities,
        "used": _numbered("u", used),
        "wasGeneratedBy": _numbered("g", generated),
        "hadMember": _numbered("m", members.values()),
        "wasAssociatedWith": _numbered(
            "a",
            (
                {"prov:activity": activity, "prov:agent": agent, "prov:plan": plan}
                for activity in activities
            ),
        ),
    }


def _parts(lineage: Lineage, path: str) -> Iterator[tuple[str, str]]:
    """Of an input that is not one output: folder and what of it is the other's output."""
    for maker in lineage.makers_of(path):
        for made in lineage.stages[maker].outputs:
            if made.startswith(f"{path}/"):
                yield path, made
            elif path.startswith(f"{made}/"):
                yield made, path


def _numbered(letter: str, rows: Iterable[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {f"_:{letter}{number}": row for number, row in enumerate(rows)}


def bill_of_materials(
    lineage: Lineage, stages: Sequence[str], commit: str, packages: str, files: Files
) -> dict[str, Any]:
    """Models, data and libraries, and what was made of what, in CycloneDX 1.6.

    Args:
        lineage: of the stages.
        stages: whose outputs, and what they read that is neither code nor made.
        commit: that all of it is of.
        packages: the text of the list of installed packages.
        files: behind the paths.
    """
    components: dict[str, dict[str, Any]] = {}
    needs: dict[str, list[str]] = {}
    for name in stages:
        stage = lineage.stages[name]
        read = [path for path in stage.inputs if lineage.makers_of(path)]
        data = lineage.data_of(name)
        for path, digest in {**data, **stage.outputs}.items():
            components[path] = _component(path, digest, files.of(path, digest))
        below = [
            *data,
            *(
                made
                for path in read
                for maker in lineage.makers_of(path)
                for made in lineage.stages[maker].outputs
                if f"{made}/".startswith(f"{path}/") or path.startswith(f"{made}/")
            ),
        ]
        needs |= {path: list(dict.fromkeys(below)) for path in stage.outputs}
        _, _, run = name.partition("train@")
        if run and f"evaluate@{run}" in stages:
            for path in stage.outputs:
                if components[path]["type"] == "machine-learning-model":
                    components[path]["modelCard"] = _model_card(
                        [each for each in below if components[each]["type"] == "data"],
                        rates(lineage, run),
                    )
    libraries = {library["bom-ref"]: library for library in _libraries(packages)}
    identity = " ".join([commit, *(lineage.digests[name] for name in stages)])
    serial = uuid.uuid5(uuid.NAMESPACE_URL, NAMESPACE + identity)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"properties": [{"name": "prefopt:commit", "value": commit}]},
        "components": [*components.values(), *libraries.values()],
        "dependencies": [{"ref": path, "dependsOn": needs.get(path, [])} for path in components],
    }


def _component(path: str, digest: str, files: Sequence[File]) -> dict[str, Any]:
    is_model = any(file.path.endswith(WEIGHTS) for file in files)
    found: dict[str, Any] = {
        "type": "machine-learning-model" if is_model else "data",
        "bom-ref": path,
        "name": path,
        "version": digest,
    }
    if [file.path for file in files] == [path]:
        return found | {"hashes": _hashes(files[0])}
    parts = [
        {"type": "file", "bom-ref": file.path, "name": file.path, "hashes": _hashes(file)}
        for file in files
    ]
    return found | {"components": parts}


def _hashes(file: File) -> list[dict[str, str]]:
    return [{"alg": "MD5", "content": file.md5}, {"alg": "SHA-256", "content": file.sha256}]


def _model_card(data: Sequence[str], found: Sequence[Rate]) -> dict[str, Any]:
    return {
        "modelParameters": {
            "task": "text-generation",
            "datasets": [{"ref": path} for path in data],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {
                    "type": "win rate",
                    "slice": f"over {rate.opponent} by {rate.judge}",
                    "value": str(rate.value),
                    "confidenceInterval": {
                        "lowerBound": str(rate.low),
                        "upperBound": str(rate.high),
                    },
                }
                for rate in found
            ]
        },
    }


def _libraries(packages: str) -> Iterator[dict[str, str]]:
    for line in packages.splitlines():
        name, pinned, version = line.partition("==")
        if pinned:
            where = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
            yield {
                "type": "library",
                "bom-ref": where,
                "name": name,
                "version": version,
                "purl": where,
            }
