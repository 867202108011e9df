"""New data beside the last accepted ones: `python -m stages.drift NEW [ACCEPTED]`.

Every line is read as `prepare` reads it, and a bad one ends this with its number. Prints JSON: what
was measured, its bound in `retrain.drift`, and whether it holds. Without accepted data only what
the new ones say of themselves is measured.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stages.artefacts import program
from stages.bounds import Bound, answer
from stages.params import Drift, load_params
from stages.sources import Text, read_texts

SIDES = {"prompt": "prompts", "completion": "chosen texts", "rejected": "rejected texts"}


@dataclass
class Facts:
    """What drift is measured by; of texts it keeps digests.

    Args:
        num_rows: all of them.
        num_pairs: those with a chosen and a rejected text.
        num_duplicates: rows that are there already.
        lengths: characters in all, by side.
        pairs: digests of each pair, and of the same with the other preference.
    """

    num_rows: int = 0
    num_pairs: int = 0
    num_duplicates: int = 0
    lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    pairs: list[tuple[bytes, bytes]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("new", type=Path)
    parser.add_argument("accepted", type=Path, nargs="?")
    asked = parser.parse_args()
    params = load_params()
    words = params.data.prompt_words
    new = facts(read_texts(asked.new, words))
    accepted = facts(read_texts(asked.accepted, words)) if asked.accepted else None
    answer(drift(new, accepted, params.retrain.drift))


def facts(texts: Iterator[Text]) -> Facts:
    """Of all rows of a data set."""
    found, seen = Facts(), set[bytes]()
    for text in texts:
        found.num_rows += 1
        for side in SIDES:
            found.lengths[side] += len(getattr(text, side))
        pair = _digest(text.prompt, text.completion, text.rejected)
        found.num_duplicates += pair in seen
        seen.add(pair)
        if text.rejected:
            found.num_pairs += 1
            found.pairs.append((pair, _digest(text.prompt, text.rejected, text.completion)))
    return found


def drift(new: Facts, accepted: Facts | None, bounds: Drift) -> list[Bound]:
    """What is measured, beside its bound."""
    known = {pair for facts in (new, accepted) if facts for pair, _ in facts.pairs}
    contradicted = sum(opposite in known for _, opposite in new.pairs)
    found = [
        Bound(
            "share of rows that are there already",
            new.num_duplicates / max(new.num_rows, 1),
            "at most",
            bounds.max_duplicates,
        ),
        Bound(
            "share of pairs whose opposite is there too",
            contradicted / max(new.num_pairs, 1),
            "at most",
            bounds.max_contradicted,
        ),
    ]
    if accepted is None:
        return found
    growth = new.num_rows / accepted.num_rows
    found += [
        Bound("rows for each accepted row", growth, "at least", bounds.min_growth),
        Bound("rows for each accepted row", growth, "at most", bounds.max_growth),
    ]
    for side, name in SIDES.items():
        before = accepted.lengths[side] / accepted.num_rows
        if before:
            change = abs(new.lengths[side] / max(new.num_rows, 1) / before - 1)
            what = f"change of the mean characters of {name}"
            found.append(Bound(what, change, "at most", bounds.max_length_change))
    return found


def _digest(*texts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(hashlib.sha256(text.strip().encode()).digest())
    return digest.digest()


if __name__ == "__main__":
    program(main)
