"""Fetch new preferences from `retrain.source`: `python -m stages.pull FILE --root FOLDER`.

All that the source holds now goes into one file of JSON lines, in the order of its files' names. A
source is a folder, a prefix of a bucket, or a revision of a data set of the hub. With `--state`
nothing is fetched, and what is printed changes when the source does.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from stages.artefacts import program
from stages.params import load_params

HUB = "hub:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--root", type=Path, required=True, help="a relative source is from there")
    parser.add_argument("--state", action="store_true", help="say how the source stands")
    asked = parser.parse_args()
    source = load_params().retrain.source
    if source is None:
        raise ValueError(
            "retrain.source: says where new preferences come from, got null; set it in params.yaml"
        )
    if asked.state:
        sys.stdout.write(json.dumps(state(source, asked.root)) + "\n")
    else:
        pull(source, asked.root, asked.file)
        sys.stdout.write(json.dumps(str(asked.file)) + "\n")


def pull(source: str, root: Path, to: Path) -> None:
    """Write all rows of a source into one file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.startswith(HUB):
        from datasets import load_dataset

        name, revision, split = _of_hub(source)
        rows: Any = load_dataset(name, revision=revision, split=split)
        with open(to, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    system, paths = _files(source, root)
    with open(to, "wb") as file:
        for path in paths:
            with system.open(path, "rb") as part:
                shutil.copyfileobj(part, file)
            if file.tell() and not _ends_a_line(to, file):
                file.write(b"\n")


def state(source: str, root: Path) -> str:
    """A digest that is another when a file of the source was added, removed or written."""
    if source.startswith(HUB):
        from huggingface_hub import dataset_info

        name, revision, _ = _of_hub(source)
        return str(dataset_info(name, revision=revision).sha)
    system, paths = _files(source, root)
    entries = [(path, system.ukey(path)) for path in paths]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _ends_a_line(path: Path, file: Any) -> bool:
    file.flush()
    with open(path, "rb") as written:
        written.seek(-1, 2)
        return written.read(1) == b"\n"


def _of_hub(source: str) -> tuple[str, str | None, str]:
    """Name, revision and split of `hub:OWNER/NAME@REVISION:SPLIT`."""
    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    return name, revision or None, split or "train"


def _files(source: str, root: Path) -> tuple[Any, list[str]]:
    import fsspec

    where = source if "://" in source else str(root / source)
    try:
        system, path = fsspec.url_to_fs(where)
    except ImportError as error:
        raise ValueError(
            f"retrain.source: its kind of bucket cannot be read, got '{source}' ({error}); "
            "install what DVC needs for it, such as dvc-s3"
        ) from error
    paths = sorted(system.glob(f"{path.rstrip('/')}/*.jsonl"))
    if not paths:
        raise ValueError(
            f"retrain.source: no *.jsonl there, got '{source}'; put files of preferences there, or "
            "name another place"
        )
    return system, paths


if __name__ == "__main__":
    program(main)
