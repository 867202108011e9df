"""Sampling from a causal LM, seeded per row.

Every row draws from its own random stream, one uniform number a token, by inversion of the
cumulative distribution: what a row samples does not depend on who its neighbours are. Rows of one
prompt length are decoded together, so that nothing is padded.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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
        prompts: token ids.
        seeds: one per row.
        max_new_tokens: at least 1.
        temperature: logits are divided by it; greater than 0.
        eos: token id at which a completion ends.
        batch_size: rows decoded together.
        progress: told the number of rows done, batch by batch.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_length[len(prompt)].append(row)
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            tokens = torch.tensor([list(prompts[row]) for row in batch])
            uniforms = torch.stack([_uniforms(seeds[row], max_new_tokens) for row in batch])
            decoded = _decode(policy, tokens, uniforms, temperature, eos)
            for row, completion in zip(batch, decoded, strict=True):
                completions[row] = completion
            progress(len(batch))
    return completions


def _uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _decode(
    policy: nn.Module,
    prompts: Int[Tensor, "batch time"],
    uniforms: Float[Tensor, "batch new_tokens"],
    temperature: float,
    eos: int,
) -> list[list[int]]:
    device = next(policy.parameters()).device
    completions: list[list[int]] = [[] for _ in range(len(prompts))]
    alive = list(range(len(prompts)))
    # A prompt of several samples is computed once.
    tokens, sample_of = prompts.to(device).unique(dim=0, return_inverse=True)
    cache = None
    for step in range(uniforms.shape[1]):
        output = policy(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1]
        if step == 0:
            cache.batch_select_indices(sample_of)
            logits = logits[sample_of]
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
        drawn = uniforms[alive, step].to(device)[:, None] * cumulative[:, -1:]
        # A uniform of exactly the total would fall off the end of the vocabulary.
        drawn = torch.searchsorted(cumulative, drawn, right=True).clamp(max=cumulative.shape[1] - 1)
        for row, token in zip(alive, drawn.squeeze(-1).tolist(), strict=True):
            completions[row].append(token)
        going = [i for i, row in enumerate(alive) if completions[row][-1] != eos]
        if not going:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(torch.tensor(going, device=device))
        alive = [alive[i] for i in going]
        tokens = drawn[going]
    return completions
