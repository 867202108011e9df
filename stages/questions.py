r"""What a judge is asked about two completions, and how its answer is read.

A template is a text file with `{prompt}`, `{first}` and `{second}`. What comes there was written by
others, so each becomes a block that it cannot leave: between two lines that hold a digest of this
very question, every line of its own quoted with "> ". Characters that steer a terminal, a
tokenizer or the direction of text are written out, and the markers of chat formats are broken.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = Path("data/judges")
CHOICES = ("A", "B")
# An answer in this form; a reason first, because what is said first informs what follows.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": [*CHOICES]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}

Choice = Literal["A", "B"]

_PLACE = re.compile(r"\{(prompt|first|second)\}")
# Beginnings of the control tokens of chat formats; a backslash after the bracket breaks them.
_CONTROL = re.compile(
    r"<(?=\||/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think|tool_call)>|/?<SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@dataclass(frozen=True)
class Question:
    """Two completions of a prompt, in the order in which a judge sees them."""

    prompt: str
    first: str
    second: str

    @property
    def key(self) -> str:
        return _sha256([self.prompt, self.first, self.second])


@dataclass(frozen=True)
class Template:
    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def ask(self, question: Question) -> str:
        """The question in full."""
        fence = f"--- {_sha256([self.text, question.key])[:16]} ---"
        blocks = {
            "prompt": _block(question.prompt, fence),
            "first": _block(question.first, fence),
            "second": _block(question.second, fence),
        }
        return _PLACE.sub(lambda place: blocks[place[1]], self.text)


def load_template(name: str) -> Template:
    """Read `data/judges/NAME.txt`.

    Raises:
        ValueError: if there is none, or it has not each of the three places once.
    """
    path = FOLDER / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt"))) or "none"
        raise ValueError(f"template: no {path}, got '{name}'; known: {known}. Write that file")
    text = path.read_text()
    places = sorted(_PLACE.findall(text))
    if places != ["first", "prompt", "second"]:
        raise ValueError(
            f"{path}: must have {{prompt}}, {{first}} and {{second}} once each, got {places}; "
            "mend it"
        )
    return Template(name, text)


def parse(reply: str) -> Choice | None:
    """The verdict of a reply that is one JSON object of `SCHEMA` and nothing else, or None."""
    try:
        answer = json.loads(reply, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or set(answer) != {"reason", "verdict"}:
        return None
    verdict = answer["verdict"]
    return verdict if isinstance(answer["reason"], str) and verdict in CHOICES else None


def _block(text: str, fence: str) -> str:
    lines = _visible(text).split("\n")
    return "\n".join([fence, *(f"> {line}" for line in lines), fence])


def _visible(text: str) -> str:
    """The text with nothing in it that acts instead of being read."""
    shown = "".join(
        f"\\u{{{ord(char):x}}}"
        if char not in "\n\t" and unicodedata.category(char) in _INVISIBLE
        else char
        for char in text.replace("\r\n", "\n")
    )
    return _CONTROL.sub(lambda marker: marker[0] + "\\", shown)


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _sha256(parts: list[str]) -> str:
    # ASCII only, so that lone surrogates have a digest too.
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
