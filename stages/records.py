"""What MLflow has recorded of trainings, for `prefopt audit`: `python -m stages.records`.

Prints JSON: the runs, and the digests of artefacts as tracking writes them; or with --find the run
behind an id, `models:/NAME/VERSION` or `models:/NAME@ALIAS`. Without an MLflow there are no runs.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artefacts import ROOT, digest, program
from stages.params import load_params
from stages.tracking import DEFAULT_URI, ENVIRONMENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REGISTRY = "models:/"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--find", default="", help="a run's id, or a model's version or alias")
    wanted = parser.parse_args().find
    uri = os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)
    if uri == DEFAULT_URI and not Path(uri.removeprefix("sqlite:///")).is_file():
        records: list[dict[str, Any]] = []
    else:
        client = _client(uri)
        runs = [_found(client, wanted)] if wanted else _runs(client, load_params().recipe)
        records = [_record(run) for run in runs]
    if wanted and not records:
        raise ValueError(f"MLflow: no records here, got nothing for '{wanted}'; see {DEFAULT_URI}")
    tables = sorted(ROOT.glob("*.parquet")) + sorted(ROOT.glob("logratios/*.parquet"))
    digests = {str(path): digest(path) for path in tables}
    answer = records[0] if wanted else {"runs": records, "digests": digests}
    sys.stdout.write(json.dumps(answer) + "\n")


def _client(uri: str) -> "MlflowClient":
    os.environ.update(ENVIRONMENT)
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _runs(client: "MlflowClient", recipe: str) -> "list[Run]":
    """All runs of a recipe, the newest first."""
    experiment = client.get_experiment_by_name(recipe)
    if experiment is None:
        return []
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _found(client: "MlflowClient", wanted: str) -> "Run":
    from mlflow.exceptions import MlflowException

    try:
        if not wanted.startswith(REGISTRY):
            return client.get_run(wanted)
        name, at, alias = wanted.removeprefix(REGISTRY).partition("@")
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(*name.rsplit("/", 1))
        return client.get_run(str(version.run_id))
    except (MlflowException, TypeError) as error:
        raise ValueError(
            f"MLflow: no such run or model version, got '{wanted}' ({error}); take an id from "
            "`mlflow ui`"
        ) from error


def _record(run: "Run") -> dict[str, Any]:
    return {
        "run_id": run.info.run_id,
        "status": run.info.status,
        "tags": dict(run.data.tags),
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "datasets": {
            each.dataset.name: each.dataset.digest
            for each in (run.inputs.dataset_inputs if run.inputs else [])
        },
    }


if __name__ == "__main__":
    program(main)
