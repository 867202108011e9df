"""Sampling from a causal LM, seeded per row.

Every row draws from its own random stream, one uniform number a token, by inversion of the
cumulative distribution: what a row samples does not depend on who its neighbours are, but for the
rounding of logits, about 1e-6 in float32, in which other shapes of matrix products may differ.

Where the model attends through `prefopt.attention`, batching is continuous: each row has a lane of
`prefopt.cache.Cache`, and when it ends another row takes the lane at the next step. Other models
decode rows of one prompt length together, with a cache of their own.
"""

import itertools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefopt.cache import Cache
from prefopt.packing import Row, packed
from prefopt.scoring import SELF_CHECK_TOLERANCE, packs

# Prompt tokens that are computed at once. They wait for their lanes with keys and values.
PROMPT_BUDGET = 4096


@torch.no_grad()
def sample(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    eos: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> list[list[int]]:
    """One completion a prompt, as token ids.

    A completion ends with `eos`, or has `max_new_tokens` tokens and no `eos`.

    Args:
        policy: a Hugging Face causal LM.
        prompts: token ids; each has at least one. What equal ones share is computed once.
        seeds: one per row.
        max_new_tokens: at least 1.
        temperature: logits are divided by it; greater than 0.
        eos: token id at which a completion ends.
        batch_size: rows decoded together.
        progress: told the number of rows that ended, at every step at which some did.
    """
    rows = [
        _Decoding(list(prompt), len(prompt), _uniforms(seed, max_new_tokens))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    decode = _continuously if _takes_lanes(policy) else _by_prompt_length
    decode(policy, rows, temperature, eos, batch_size, progress)
    return [row.tokens[row.prompt_length :] for row in rows]


class _Decoding:
    """A row and the random numbers of its completion."""

    def __init__(self, tokens: list[int], prompt_length: int, uniforms: list[float]) -> None:
        self.tokens, self.prompt_length, self.uniforms = tokens, prompt_length, uniforms

    def uniform(self) -> float:
        """The next token's."""
        return self.uniforms[len(self.tokens) - self.prompt_length]

    def extend(self, token: int, eos: int) -> bool:
        """Append a token; whether it was the row's last."""
        self.tokens.append(token)
        return token == eos or len(self.tokens) - self.prompt_length == len(self.uniforms)


def _uniforms(seed: int, count: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _drawn(
    logits: Float[Tensor, "batch vocab"], rows: Sequence[_Decoding], temperature: float
) -> list[int]:
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    uniforms = torch.tensor([row.uniform() for row in rows], device=logits.device)[:, None]
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # A uniform of exactly the total would fall off the end of the vocabulary.
    return drawn.squeeze(-1).clamp(max=logits.shape[1] - 1).tolist()


def _continuously(
    policy: nn.Module,
    rows: Sequence[_Decoding],
    temperature: float,
    eos: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    # Rows of one prompt follow each other, the longest prompts first: they are taken from the end.
    waiting = sorted(rows, key=lambda row: (len(row.tokens), row.tokens))
    length = max((len(row.tokens) + len(row.uniforms) for row in rows), default=0)
    lanes = _Lanes(policy, min(batch_size, len(rows)), length)
    while waiting or lanes.rows:
        while waiting and len(lanes.rows) < batch_size:
            lanes.enter(len(lanes.rows), waiting)
        tokens = _drawn(lanes.logits(), lanes.rows, temperature)
        ended = [
            lane
            for lane, (row, token) in enumerate(zip(lanes.rows, tokens, strict=True))
            if row.extend(token, eos)
        ]
        for lane in reversed(ended):
            if waiting:
                lanes.enter(lane, waiting)
            else:
                lanes.close(lane)
        if ended:
            progress(len(ended))


class _Lanes:
    """A policy, the rows that it is decoding, and their keys and values.

    A lane holds all of its row's tokens but the last, which the next step reads.
    """

    def __init__(self, policy: nn.Module, number: int, length: int) -> None:
        self.rows: list[_Decoding] = []
        self._policy = policy
        self._device = next(policy.parameters()).device
        self._cache = Cache(number, length)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._prefixes: dict[tuple[int, ...], slice] = {}

    def enter(self, lane: int, waiting: list[_Decoding]) -> None:
        """Put the last of the waiting rows into a lane: one of those in use, or the next."""
        prefix = tuple(waiting[-1].tokens[:-1])
        if prefix:
            if prefix not in self._prefixes:
                self._compute_prefixes(waiting)
            span = self._prefixes[prefix]
            self._cache.enter(lane, [(k[:, span], v[:, span]) for k, v in self._layers])
        self.rows[lane : lane + 1] = [waiting.pop()]

    def close(self, lane: int) -> None:
        """Drop a lane's row; the last lane's moves there."""
        last = self.rows.pop()
        if lane < len(self.rows):
            self.rows[lane] = last
            self._cache.move(len(self.rows), lane, len(last.tokens) - 1)

    def logits(self) -> Float[Tensor, "lanes vocab"]:
        """What follows each row."""
        positions = self._cache.start([len(row.tokens) - 1 for row in self.rows], self._device)
        tokens = torch.tensor([row.tokens[-1:] for row in self.rows], device=self._device)
        output = self._policy(
            tokens, position_ids=positions[:, None], use_cache=False, cache=self._cache
        )
        return output.logits[:, -1]

    def _compute_prefixes(self, waiting: Sequence[_Decoding]) -> None:
        """All tokens but the last of the rows that are next, as one packed row."""
        rows: list[Row] = []
        self._prefixes = {}
        end = 0
        for row in reversed(waiting):
            prefix = tuple(row.tokens[:-1])
            if not prefix or (rows and end + len(prefix) > PROMPT_BUDGET):
                break
            if prefix not in self._prefixes:
                self._prefixes[prefix] = slice(end, end + len(prefix))
                rows.append(Row(prefix, row.tokens[-1:]))
                end += len(prefix)
        layout = packed(rows).to(self._device)
        self._layers = []
        self._policy(
            layout.tokens[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=1,
            layout=layout,
            record=self._layers,
        )


_TAKES_LANES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _takes_lanes(policy: nn.Module) -> bool:
    """Whether rows of unlike lengths may be decoded together: tried once, on a few tokens."""
    if policy not in _TAKES_LANES:
        reason = _objection(policy)
        _TAKES_LANES[policy] = reason is None
        if reason is not None:
            warnings.warn(
                f"{type(policy).__name__} decodes rows of one prompt length together, which is "
                f"slower and as exact: {reason}",
                stacklevel=3,
            )
    return _TAKES_LANES[policy]


def _objection(policy: nn.Module) -> str | None:
    if not packs(policy):
        return "it cannot be given packed rows"
    hugging_face: Any = policy
    vocab_size = hugging_face.config.get_text_config().vocab_size
    words = [(7 * i + 3) % vocab_size for i in range(16)]
    rows = [_Decoding(words[start:end], 0, []) for start, end in ((0, 9), (9, 10), (10, 13))]
    lanes = _Lanes(policy, len(rows), len(words))
    for lane in range(3):
        lanes.enter(lane, rows)
    difference = 0.0
    for token in words[-3:]:
        found = lanes.logits().float().log_softmax(-1)
        for row, logps in zip(lanes.rows, found, strict=True):
            tokens = torch.tensor([row.tokens], device=logps.device)
            plain = policy(tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)
            difference = max(difference, (plain - logps).abs().max().item())
            row.tokens.append(token)
    if difference <= SELF_CHECK_TOLERANCE:
        return None
    return f"unlike lengths change its log-probabilities by {difference:.2g} nats"


def _by_prompt_length(
    policy: nn.Module,
    rows: Sequence[_Decoding],
    temperature: float,
    eos: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    by_length: defaultdict[int, list[_Decoding]] = defaultdict(list)
    for row in rows:
        by_length[len(row.tokens)].append(row)
    for _, alike in sorted(by_length.items()):
        for start in range(0, len(alike), batch_size):
            _decode_batch(policy, alike[start : start + batch_size], temperature, eos, progress)


def _decode_batch(
    policy: nn.Module,
    rows: Sequence[_Decoding],
    temperature: float,
    eos: int,
    progress: Callable[[int], object],
) -> None:
    device = next(policy.parameters()).device
    # A prompt of several samples is computed once.
    tokens, sample_of = _tokens(rows, device).unique(dim=0, return_inverse=True)
    cache = None
    alive = list(rows)
    for step in itertools.count():
        output = policy(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        cache = output.get("past_key_values")
        if step == 0:
            logits = logits[sample_of]
        drawn = _drawn(logits, alive, temperature)
        going = [
            i
            for i, (row, token) in enumerate(zip(alive, drawn, strict=True))
            if not row.extend(token, eos)
        ]
        if len(going) < len(alive):
            progress(len(alive) - len(going))
        if not going:
            return
        alive = [alive[i] for i in going]
        tokens = _tokens(alive, device)
        # A model that hands no cache back reads whole rows.
        if cache is not None:
            kept = torch.tensor(going, device=device)
            cache.reorder_cache(sample_of[kept] if step == 0 else kept)
            tokens = tokens[:, -1:]


def _tokens(rows: Sequence[_Decoding], device: torch.device) -> Int[Tensor, "batch time"]:
    return torch.tensor([row.tokens for row in rows], device=device)
