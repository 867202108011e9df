"""A model's card, in Hugging Face's form: what it came from, what it is worth, and who says so."""

import json
from pathlib import Path
from typing import Any

from flows.evaluations import metrics, rates
from flows.lineage import Lineage
from flows.pages import render
from flows.statements import File

FINE = "fine"
ADAPTERS = "adapter_config.json"


def examiners(lineage: Lineage, run: str) -> list[str]:
    """The stages that examined the judges of a run."""
    judges = dict.fromkeys(rate.judge for rate in rates(lineage, run))
    return [f"exam@{judge}" for judge in judges if f"exam@{judge}" in lineage.stages]


def card(lineage: Lineage, run: str, commit: str, weights: list[File]) -> str:
    """The text of README.md beside a run's weights.

    Args:
        lineage: of the run.
        run: that was trained and evaluated.
        commit: of all of it.
        weights: the model's files.
    """
    trained, found = f"train@{run}", metrics(lineage, run)
    params = _by_section(lineage, trained)
    row = params[f"runs.{run}"]
    evaluated = _by_section(lineage, f"evaluate@{run}")
    base, split = str(evaluated["base"]), str(evaluated["evaluation.split"])
    data = {
        path: digest
        for name in lineage.upstream([trained])
        for path, digest in lineage.data_of(name).items()
    }
    return render(
        "card.md",
        run=run,
        row=row,
        shared={key: value for key, value in params["train"].items() if key not in row},
        seed=row.get("seed", params["compute"]["seed"]),
        adapters=any(Path(file.path).name == ADAPTERS for file in weights),
        base=base,
        matter=_front_matter(lineage, run, row, base, split),
        rates=rates(lineage, run),
        split=split,
        metrics=found,
        gold=evaluated["label.reward"],
        examined=[
            json.loads(Path(path).read_text())
            for name in examiners(lineage, run)
            for path in lineage.stages[name].outputs
        ],
        cautions=[each["sentence"] for each in found["findings"] if each["level"] != FINE],
        data=data,
        weights=weights,
        commit=commit,
        digest=lineage.digests[trained],
    )


def _by_section(lineage: Lineage, name: str) -> dict[str, Any]:
    return {key.partition(":")[2]: value for key, value in lineage.stages[name].params.items()}


def _front_matter(
    lineage: Lineage, run: str, row: dict[str, Any], base: str, split: str
) -> dict[str, str]:
    """Key -> value in JSON, which YAML reads; a base that lies in a folder has no name there."""
    source = str(_by_section(lineage, "prepare")["data"]["source"])
    result = {
        "task": {"type": "text-generation", "name": "text generation"},
        "dataset": {"type": Path(source).stem, "name": source, "split": split},
        "metrics": [
            {
                "type": "win_rate",
                "name": f"win rate over {rate.opponent} by {rate.judge}",
                "value": rate.value,
            }
            for rate in rates(lineage, run)
        ],
    }
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefopt", row.get("loss", "best-of-n")],
        "model-index": [{"name": run, "results": [result]}],
    }
    if not Path(base).is_dir():
        matter["base_model"] = base
    return {key: json.dumps(value) for key, value in matter.items()}
