"""Who is champion, in MLflow's registry: `python -m stages.registry show|decide|rollback`.

A registered model is called as its recipe. Its versions name what DVC stores, by digest and commit,
and copy no weights. Aliases say what a version is: `champion`, `previous` (who was it before), and
`challenger` (the last that was not promoted). What aliases are to become is written down first and
struck out last, so that the next command completes what a killed one began.

Each command prints JSON: the versions behind the aliases.
"""

import argparse
import fcntl
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artefacts import WORK, digest, logratios_of, program
from stages.params import load_params
from stages.tracking import connect, find

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

INTENT = "prefopt.intent"  # tag of the registered model: alias -> version, or null
PREDECESSOR = "prefopt.predecessor"  # tag of a version: who was champion before it
IDENTITY = ("prefopt.run", "prefopt.data", "dvc.md5")  # tags by which a version is known
ALIASES = ("champion", "previous", "challenger")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["show", "decide", "rollback"])
    parser.add_argument("proposal", nargs="?", default="", help="JSON, of decide")
    asked = parser.parse_args()
    name = load_params().recipe
    client = connect()
    WORK.mkdir(exist_ok=True)
    with open(WORK / "registry.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        repair(client, name)
        match asked.command:
            case "decide":
                decide(client, name, **json.loads(asked.proposal))
            case "rollback":
                roll_back(client, name)
            case _:
                pass
        sys.stdout.write(json.dumps(shown(client, name)) + "\n")


def shown(client: "MlflowClient", name: str) -> dict[str, Any]:
    """Alias -> the version behind it, null without one; and the model's name."""
    held = aliases(client, name)
    found: dict[str, Any] = {"name": name}
    for alias in ALIASES:
        number = held.get(alias)
        found[alias] = None
        if number is not None:
            version = client.get_model_version(name, number)
            found[alias] = {"version": number, "source": version.source, "tags": version.tags}
    return found


def decide(
    client: "MlflowClient",
    name: str,
    *,
    challenger: Mapping[str, Any],
    first: Mapping[str, Any],
    promote: bool,
) -> None:
    """Register a challenger, and make it the champion or not.

    Doing it twice changes nothing.

    Args:
        client: of MLflow.
        name: of the registered model.
        challenger: `source` and `tags` of its version.
        first: of the version that is champion where there is none yet.
        promote: whether the gate holds.
    """
    if "champion" not in aliases(client, name):
        become(client, name, {"champion": _version(client, name, first).version})
    champion = aliases(client, name)["champion"]
    version = str(_version(client, name, challenger).version)
    if version == champion:
        return
    if promote:
        client.set_model_version_tag(name, version, PREDECESSOR, champion)
        become(client, name, {"previous": champion, "champion": version, "challenger": None})
    else:
        become(client, name, {"challenger": version})


def roll_back(client: "MlflowClient", name: str) -> None:
    """Make the previous champion the champion again; who was it becomes a challenger.

    Raises:
        ValueError: if there is no previous one.
    """
    held = aliases(client, name)
    if "previous" not in held:
        raise ValueError(
            f"rollback: nobody was champion of '{name}' before, got aliases "
            f"{', '.join(held) or 'none'}; there is nothing to go back to"
        )
    tags = client.get_model_version(name, held["previous"]).tags
    become(
        client,
        name,
        {
            "champion": held["previous"],
            "previous": tags.get(PREDECESSOR),
            "challenger": held["champion"],
        },
    )


def become(client: "MlflowClient", name: str, wanted: Mapping[str, str | None]) -> None:
    """Give aliases to versions, or to none: all of them, whatever interrupts it."""
    client.set_registered_model_tag(name, INTENT, json.dumps(wanted))
    repair(client, name)


def repair(client: "MlflowClient", name: str) -> None:
    """Complete a change of aliases that was begun, if one was."""
    found = client.search_registered_models(f"name = '{name}'")
    written = found[0].tags.get(INTENT) if found else None
    if written is None:
        return
    held = aliases(client, name)
    for alias, version in json.loads(written).items():
        if version is not None:
            client.set_registered_model_alias(name, alias, version)
        elif alias in held:
            client.delete_registered_model_alias(name, alias)
    client.delete_registered_model_tag(name, INTENT)


def aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Alias -> version."""
    found = client.search_registered_models(f"name = '{name}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


def _version(client: "MlflowClient", name: str, wanted: Mapping[str, Any]) -> "ModelVersion":
    """The version of these tags, registered if there is none."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = wanted["tags"]
    for version in client.search_model_versions(f"name = '{name}'"):
        if all(version.tags.get(key) == tags[key] for key in IDENTITY):
            return version
    return client.create_model_version(
        name, wanted["source"], run_id=_training(client, name, tags["prefopt.run"]), tags=tags
    )


def _training(client: "MlflowClient", recipe: str, run: str) -> str | None:
    """MLflow's id of the training of a run of this workspace, if MLflow saw it."""
    path: Path = logratios_of(run)
    if not path.is_file():
        return None
    found = find(client, recipe, {"prefopt.logratios": digest(path), "prefopt.run": run})
    return found.info.run_id if found else None


if __name__ == "__main__":
    program(main)
