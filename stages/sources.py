"""Data sets: where texts come from, each with its file and line.

A data set is JSON lines, `{"prompt": ..., "completion": ...}` or `{"prompt": ..., "chosen": ...,
"rejected": ...}` or whole dialogues `{"chosen": ..., "rejected": ...}`, or `{"prompt": ...,
"completions": [...], "rewards": [...]}`, or a card: a JSON file that names a table of sentences
inside an installed Python package, by its digest.
"""

import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TURN = "\n\nAssistant:"  # begins an assistant's turn of a dialogue
KINDS = (
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"prompt", "completions", "rewards"},
)


@dataclass(frozen=True)
class Text:
    """One row of a data set.

    Args:
        where: its file and line.
        prompt: what comes before the completion.
        completion: the data's own; where it has pairs, the chosen one; of a list the best.
        rejected: of a list the worst; empty without pairs, and where all rewards are equal.
        shifted: whether it is of the evaluation's other distribution.
        ranked: completions with rewards, in the data's order; empty without lists.
        rewards: theirs.
    """

    where: str
    prompt: str
    completion: str
    rejected: str = ""
    shifted: bool = False
    ranked: Sequence[str] = ()
    rewards: Sequence[float] = ()


def read_texts(path: Path, prompt_words: int) -> Iterator[Text]:
    """The rows of a data set.

    Args:
        path: of JSON lines, plain or gzipped, or of a card.
        prompt_words: a sentence's opening words are its prompt.
    """
    if path.suffix == ".json":
        yield from read_sentences(path, prompt_words)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield parse(line, f"{path}:{number}")


def read_sentences(card: Path, prompt_words: int) -> Iterator[Text]:
    """The sentences that a card names: the opening words are the prompt, the rest the completion.

    Sentences of fewer than twice those words are left out.

    Raises:
        ValueError: if the package is missing, or its file is another than the card says.
    """
    named = json.loads(card.read_text())
    spec = importlib.util.find_spec(named["package"])
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{card}: its sentences ship in the package {named['package']}, got no such package; "
            "run `make repro`, which installs it"
        )
    path = Path(spec.submodule_search_locations[0]) / named["file"]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != named["sha256"]:
        raise ValueError(
            f"{card}: {path.name} has other bytes than the card says, got SHA-256 "
            f"{hashlib.sha256(content).hexdigest()}; install the package of requirements.lock"
        )
    head, *lines = content.decode("utf-8").splitlines()
    column = head.split("\t").index(named["column"])
    for number, line in enumerate(lines, start=2):
        text = line.split("\t")[column].replace("''", '"').strip()
        words = text.split(" ")
        # A prompt and at least as many words to predict.
        if len(words) >= 2 * prompt_words:
            prompt = " ".join(words[:prompt_words])
            yield Text(f"{path.name}:{number}", prompt, text.removeprefix(prompt))


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
    if set(row) == {"chosen", "rejected"}:
        return _dialogues(row, where)
    if set(row) not in KINDS:
        raise ValueError(
            f"{where}: other fields than expected, got {sorted(row)}; give prompt and completion, "
            "or prompt, chosen and rejected, or prompt, completions and rewards"
        )
    for name in sorted(set(row) - {"completions", "rewards"}):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(
                f"{where}: empty {name}, got {row[name]!r}; give text or drop the line"
            )
    if "completions" in row:
        return _listed(row, where)
    if "completion" in row:
        return Text(where, row["prompt"], row["completion"])
    if row["chosen"] == row["rejected"]:
        raise ValueError(
            f"{where}: chosen and rejected are identical, got {row['chosen'][:60]!r}; drop the line"
        )
    return Text(where, row["prompt"], row["chosen"], row["rejected"])


def _dialogues(row: dict[str, Any], where: str) -> Text:
    """Two dialogues of one beginning: the prompt is what they share up to an assistant's turn.

    The chosen turn may be empty: people have preferred silence. An empty rejected one would read as
    no pair.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(f"{where}: no dialogues, got {str(row)[:60]!r}; give two texts")
    turns = [match.end() for match in re.finditer(TURN, chosen)]
    place = max((end for end in turns if rejected.startswith(chosen[:end])), default=0)
    if not place:
        raise ValueError(
            f"{where}: dialogues share no beginning up to {TURN!r}, got {chosen[:60]!r} and "
            f"{rejected[:60]!r}; give prompt, chosen and rejected"
        )
    if chosen == rejected or not rejected[place:].strip():
        raise ValueError(
            f"{where}: no pair, got the rejected turn {rejected[place:][:60]!r} beside "
            f"{chosen[place:][:60]!r}; drop the line"
        )
    return Text(where, chosen[:place], chosen[place:], rejected[place:])


def _listed(row: dict[str, Any], where: str) -> Text:
    completions, rewards = row["completions"], row["rewards"]
    if not (isinstance(completions, list) and isinstance(rewards, list)) or (
        len(completions) != len(rewards) or len(completions) < 2
    ):
        raise ValueError(
            f"{where}: not as many rewards as completions, two at least, got "
            f"{str(completions)[:60]} and {str(rewards)[:60]}; give two lists of one length"
        )
    for text in completions:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: empty completion, got {text!r}; give text or drop it")
        if completions.count(text) > 1:
            raise ValueError(f"{where}: a completion twice, got {text[:60]!r}; keep one")
    for reward in rewards:
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if not is_number or not math.isfinite(reward):
            raise ValueError(f"{where}: a reward is no number, got {reward!r}; mend or drop it")
    best, worst = (rewards.index(end(rewards)) for end in (max, min))
    return Text(
        where,
        row["prompt"],
        completions[best],
        completions[worst] if rewards[best] != rewards[worst] else "",
        ranked=completions,
        rewards=list(map(float, rewards)),
    )
