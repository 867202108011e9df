"""Templates: what stands around a prompt, and around a prompt with a completion to improve on.

A template is a text with the fields `{prompt}` and `{completion}`; for a chat model it is a user's
turn. Its own words are tokenised once, by `prepare`; fields are filled with token ids, so that
nothing in a text can end a turn or begin one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artefacts import TEMPLATES

FIELDS = ("prompt", "completion")

# Of Unicode's private use: in a chat template's output they are where a field was.
_MARKS = {field: f"\ue000{field}\ue001" for field in FIELDS}


@dataclass(frozen=True)
class Template:
    """Token ids, and between them the names of fields."""

    parts: list[list[int] | str]

    def filled(self, **fields: Sequence[int]) -> list[int]:
        """Token ids with each field's in its places."""
        tokens: list[int] = []
        for part in self.parts:
            tokens += fields[part] if isinstance(part, str) else part
        return tokens

    def field(self, tokens: Sequence[int]) -> list[int]:
        """The token ids that fill the one field of this template, out of the whole."""
        before, _, after = self.parts
        return list(tokens[len(before) : len(tokens) - len(after)])


@dataclass(frozen=True)
class Templates:
    """Those of one pipeline.

    Args:
        prompt: what the policy is given; its field is the prompt's text.
        revision: what it is given to improve on a completion.
        eos: the token at which a completion ends.
    """

    prompt: Template
    revision: Template
    eos: int

    def revision_of(self, prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
        """The revision prompt that shows a completion, without its end.

        Args:
            prompt: as the policy was given it.
            completion: what was written, with or without its end.
        """
        ended = bool(completion) and completion[-1] == self.eos
        return self.revision.filled(
            prompt=self.prompt.field(prompt),
            completion=completion[:-1] if ended else completion,
        )


def tokenised_template(text: str, tokenizer: Any, *, bos: int, chat: bool) -> Template:
    """A template's words as token ids; control tokens that it writes out are control tokens.

    Args:
        text: with its fields.
        tokenizer: a Hugging Face tokenizer.
        bos: the token before a plain prompt; a chat template brings its own.
        chat: whether the text is a user's turn in the tokenizer's chat template.
    """
    if chat:
        for field, mark in _MARKS.items():
            text = text.replace(f"{{{field}}}", mark)
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        for field, mark in _MARKS.items():
            text = text.replace(mark, f"{{{field}}}")
    pieces = re.split("{(" + "|".join(FIELDS) + ")}", text)
    parts: list[list[int] | str] = []
    for number, piece in enumerate(pieces):
        # Every second piece is what the pattern's group found: a field's name.
        is_field = number % 2 == 1
        parts.append(piece if is_field else tokenizer.encode(piece, add_special_tokens=False))
    if not chat:
        first = parts[0]
        assert isinstance(first, list)
        parts[0] = [bos, *first]
    return Template(parts)


def read_text(path: Path) -> str:
    """A revision prompt's text, from its file.

    Raises:
        ValueError: if the file is missing or lacks a field.
    """
    if not path.is_file():
        raise ValueError(
            f"revision.template: no such file, got '{path}'; name a text with the fields "
            "{prompt} and {completion}, as recipes/templates/revision.txt is"
        )
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    missing = [field for field in FIELDS if f"{{{field}}}" not in text]
    if missing:
        raise ValueError(
            f"{path}: lacks {{{missing[0]}}}, got {text[:60]!r}; a revision prompt shows both, "
            "the prompt and the completion to improve on"
        )
    return text


def write_templates(path: Path, templates: Templates) -> None:
    path.write_text(
        json.dumps(
            {
                "prompt": templates.prompt.parts,
                "revision": templates.revision.parts,
                "eos": templates.eos,
            }
        )
        + "\n"
    )


def read_templates(path: Path = TEMPLATES) -> Templates:
    written = json.loads(path.read_text())
    return Templates(Template(written["prompt"]), Template(written["revision"]), written["eos"])
