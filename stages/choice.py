"""Models on this machine as judges: the likelier of two answers.

A conversation goes through the tokenizer's chat template, where it has one; what its messages say
is never read as control tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.packing import Row
from prefopt.scoring import score
from stages import models


class TooLong(ValueError):
    """What is asked does not fit into the model's context."""


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int
    completion_tokens: int


class Chooser:
    """A causal LM that fills in a form.

    Args:
        name: of the model, as in params.yaml.
        dtype: of the matrix products.
        num_threads: other counts give other bits.
    """

    def __init__(self, name: str, *, dtype: str, num_threads: int) -> None:
        models.set_up(seed=0, num_threads=num_threads)
        self._tokenizer: Any = models.load_tokenizer(name)
        self._policy = models.load_policy(name)
        self._dtype = models.DTYPES[dtype]
        self.context = int(models.load_config(name).max_position_embeddings)
        self.name = pinned(name, self._policy, self._tokenizer)

    def reply(self, messages: Sequence[tuple[str, str]], schema: dict[str, Any]) -> Reply:
        """A JSON object of the schema.

        An enumeration's value is the likeliest, what stands before it given; other strings, which
        would have to be generated, stay empty.

        Args:
            messages: roles and contents.
            schema: an object of strings, some with an `enum`.

        Raises:
            ValueError: if the schema holds anything else; `TooLong` if the messages exceed the
                context.
        """
        asked = conversation(self._tokenizer, messages)
        text, used = "{", 0
        for number, (name, field) in enumerate(_fields(schema).items()):
            text += f'{", " if number else ""}{json.dumps(name)}: "'
            if field:
                begun = [*asked, *plain(self._tokenizer, text)]
                values = [plain(self._tokenizer, value + '"') for value in field]
                chosen = self._likeliest(begun, values)
                text += field[chosen]
                used += len(values[chosen])
            text += '"'
        return Reply(text + "}", len(asked), used)

    def _likeliest(self, begun: list[int], values: list[list[int]]) -> int:
        longest = len(begun) + max(map(len, values))
        if longest > self.context:
            raise TooLong(
                f"context: too long for {self.name}, got {longest} tokens; at most {self.context}"
            )
        logps = score(
            self._policy,
            [Row(begun, value) for value in values],
            token_budget=self.context * len(values),
            compute_dtype=self._dtype,
            progress=lambda _: None,
        )
        sums = [sum(logp) for logp in logps]
        return sums.index(max(sums))


def _fields(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Name -> allowed values, none of a free string."""
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
        raise ValueError(
            f"schema: no object with properties, got {schema!r}; ask for an object of strings"
        )
    fields: dict[str, list[str]] = {}
    for name, field in properties.items():
        values: Any = field.get("enum", []) if isinstance(field, dict) else None
        plain = isinstance(values, list) and all(
            isinstance(value, str) and json.dumps(value) == f'"{value}"' for value in values
        )
        if not plain or not (values or field == {"type": "string"}):
            raise ValueError(
                f"schema: '{name}' is neither a string nor an enumeration of plain ones, got "
                f"{field!r}; ask for one of these"
            )
        fields[name] = values
    return fields


def conversation(
    tokenizer: Any, messages: Sequence[tuple[str, str]], *, answered: bool = False
) -> list[int]:
    """Token ids of messages; an answer follows unless they hold it."""
    contents = [content for _, content in messages]
    if tokenizer.chat_template is None:
        return [models.bos(tokenizer), *plain(tokenizer, "\n\n".join(contents) + "\n")]
    # Contents come in after the template was rendered, between its control tokens.
    places = [f"\ue000{number}\ue000" for number in range(len(messages))]
    rendered = tokenizer.apply_chat_template(
        [
            {"role": role, "content": place}
            for (role, _), place in zip(messages, places, strict=True)
        ],
        tokenize=False,
        add_generation_prompt=not answered,
    )
    tokens: list[int] = []
    for place, content in zip(places, contents, strict=True):
        before, rendered = rendered.split(place)
        tokens += tokenizer.encode(before, add_special_tokens=False)
        tokens += plain(tokenizer, content)
    return tokens + tokenizer.encode(rendered, add_special_tokens=False)


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def pinned(name: str, model: Any, tokenizer: Any) -> str:
    """A model's name with a digest of its weights and vocabulary, which says what answers."""
    sha = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        sha.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return f"{name.rstrip('/').rsplit('/', 1)[-1]}@{sha.hexdigest()[:12]}"
