"""Read the data, split it by prompt, tokenise once: `python -m stages.prepare`.

Splits share no prompt, and no evaluation text nearly repeats a training text.
"""

import array
import hashlib
import itertools
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import models
from stages.artefacts import (
    CHECKED,
    LISTS,
    LISTS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    TEMPLATES,
    Column,
    TableWriter,
    blocks,
    program,
    spooled,
    stage,
)
from stages.leaks import leaks, refuse
from stages.params import Data, Params, load_params
from stages.sources import Text, read_texts
from stages.templates import Templates, read_text, tokenised_template, write_templates

BLOCK = 1024  # rows that are held at a time


TYPES = {"shifted": pa.bool_(), "ranked": pa.list_(pa.string()), "rewards": pa.list_(pa.float64())}
TEXTS = pa.schema([(field.name, TYPES.get(field.name, pa.string())) for field in fields(Text)])


def main() -> None:
    params = load_params()
    data, revision = params.data, params.revision
    sources = [Path(data.source), *([Path(data.shifted)] if data.num_shifted else [])]
    relevant = {
        "base": params.base,
        "data": data.model_dump(),
        "revision": revision.model_dump(),
        "seed": params.compute.seed,
    }
    with stage(
        "prepare",
        inputs=[CHECKED, *sources, Path(revision.template)],
        outputs=[PROMPTS, LISTS, TEMPLATES],
        params=relevant,
    ) as workspace:
        texts = spooled_texts(first_of_each_prompt(read_sources(data)))
        num_rows = len(texts["prompt"])
        num_shifted = sum(texts["shifted"])
        sizes = split_sizes(num_rows - num_shifted, num_shifted, data)
        generator = random.Random(params.compute.seed)
        order = array.array("q", range(num_rows - num_shifted))
        if data.split_by == "shuffle":
            generator.shuffle(order)
        else:
            order = in_lasting_order(order, texts["prompt"], params.compute.seed)
        shifted = array.array("q", range(num_rows - num_shifted, num_rows))
        generator.shuffle(shifted)
        order = order[-(sum(sizes.values()) - data.num_shifted) :] + shifted[: data.num_shifted]

        def whole(row: int) -> str:
            return texts["prompt"][row] + texts["completion"][row]

        training, evaluation = order[: sizes["train"]], order[sizes["train"] :]
        refuse(
            leaks(map(whole, training), map(whole, evaluation)),
            lambda number: texts["where"][training[number]],
            lambda number: texts["where"][evaluation[number]],
        )
        splits = (split for split, size in sizes.items() for _ in range(size))
        templates, columns_of = tokenised(params)
        write_templates(workspace.partial(TEMPLATES), templates)
        with (
            TableWriter(workspace.partial(PROMPTS), PROMPTS_SCHEMA) as table,
            TableWriter(workspace.partial(LISTS), LISTS_SCHEMA) as lists,
        ):
            for block in blocks(order, BLOCK):
                rows = [Text(*(texts[name][row] for name in TEXTS.names)) for row in block]
                split = list(itertools.islice(splits, len(rows)))
                columns = columns_of(rows)
                lists.extend({name: columns.pop(name) for name in LISTS_SCHEMA.names})
                table.extend({"split": split, **columns})


def tokenised(params: Params) -> tuple[Templates, Callable[[list[Text]], dict[str, list[Any]]]]:
    """The templates, and what makes the columns of `prompts` and `lists` from texts.

    It raises a ValueError if a prompt leaves no room for its completion, or the revision prompt of
    a completion none for a better one.
    """
    limit = params.data.max_completion_tokens
    tokenizer = models.load_tokenizer(params.base)
    context = models.load_config(params.base).max_position_embeddings
    bos, eos = models.bos(tokenizer), models.eos(tokenizer)
    revision = read_text(Path(params.revision.template))
    prompt_template, revision_template = (
        tokenised_template(text, tokenizer, bos=bos, chat=params.data.chat)
        for text in ("{prompt}", revision)
    )
    templates = Templates(prompt_template, revision_template, eos)
    longest = [eos + 1] * limit
    revises = params.revision.train or params.revision.rounds

    def ids(column: list[str]) -> list[list[int]]:
        # Control tokens written out in a text stay text.
        return tokenizer(column, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def completion_ids(column: list[str]) -> list[list[int]]:
        return [[*row, eos][:limit] for row in ids(column)]

    def columns(texts: list[Text]) -> dict[str, list[Any]]:
        prompts = [
            prompt_template.filled(prompt=row) for row in ids([text.prompt for text in texts])
        ]
        for text, prompt in zip(texts, prompts, strict=True):
            revised = templates.revision_of(prompt, longest) if revises else []
            for what, tokens in (("prompt", prompt), ("revision prompt", revised)):
                if len(tokens) + limit > context:
                    raise ValueError(
                        f"{text.where}: {what} and completion exceed the model's context of "
                        f"{context} tokens, got {len(tokens)} + {limit}; shorten the prompt "
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
            "completions": [
                completion_ids(list(text.ranked)) if text.ranked else [] for text in texts
            ],
            "rewards": [text.rewards for text in texts],
        }

    return templates, columns


def first_of_each_prompt(texts: Iterable[Text]) -> Iterator[Text]:
    """Keep one row a prompt, compared without case, so that no split shares one with another."""
    # A database without a name is a file that goes with its connection.
    with closing(sqlite3.connect("")) as seen:
        seen.execute("CREATE TABLE prompts (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        for text in texts:
            digest = hashlib.blake2b(text.prompt.casefold().encode(), digest_size=16).digest()
            if seen.execute("INSERT OR IGNORE INTO prompts VALUES (?)", (digest,)).rowcount:
                yield text


def in_lasting_order(rows: Iterable[int], prompts: Column, seed: int) -> "array.array[int]":
    """Rows in an order that is random and does not depend on which other rows there are.

    The splits are pieces of this order, training first. More rows move the others towards its
    beginning alone, so that what was trained on is never evaluated on later.
    """

    def place(row: int) -> bytes:
        return hashlib.blake2b(
            prompts[row].casefold().encode(), digest_size=16, key=str(seed).encode()
        ).digest()

    return array.array("q", sorted(rows, key=place))


def spooled_texts(texts: Iterable[Text]) -> dict[str, Column]:
    """The columns of texts, on disk."""
    batches = (
        pa.RecordBatch.from_pylist([asdict(text) for text in block], TEXTS)
        for block in blocks(texts, BLOCK)
    )
    return spooled(batches, TEXTS)


def read_sources(data: Data) -> Iterator[Text]:
    """The rows of the data, then those of the shifted data, if any are wanted."""
    yield from read_texts(Path(data.source), data.prompt_words)
    if data.num_shifted:
        for text in read_texts(Path(data.shifted), data.prompt_words):
            yield replace(text, shifted=True)


def split_sizes(num_rows: int, num_shifted: int, data: Data) -> dict[str, int]:
    """How many of the last rows are of each split, in their order, and how many shifted ones."""
    num_train = num_rows - data.num_validation - data.num_test
    if num_train < (data.num_train or 1):
        raise ValueError(
            f"data: too few prompts for the splits, got {num_rows} different ones for "
            f"{data.num_train or 'at least 1'} training, {data.num_validation} validation and "
            f"{data.num_test} test; lower those"
        )
    if num_shifted < data.num_shifted:
        raise ValueError(
            f"data.num_shifted: more than {data.shifted} has that the data has not, got "
            f"{data.num_shifted}; at most {num_shifted}"
        )
    return {
        "train": data.num_train or num_train,
        "validation": data.num_validation,
        "test": data.num_test,
        "shifted": data.num_shifted,
    }


if __name__ == "__main__":
    program(main)
