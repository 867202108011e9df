"""Reward models: what a sequence classifier makes of texts, and the loss that it is trained by.

A classifier with one logit gives a text's reward; of one with two, whose classes are worse and
better, the reward is their difference. Token ids in, one float32 number a text out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def rewards(
    classifier: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " texts"]:
    """The reward of every text of a micro-batch; carries the gradient.

    Texts are padded on the right and the padding is masked. A decoder is read at a text's last
    token that is not its padding token, as Hugging Face reads it, but found before the texts are
    padded: so neither what pads them nor their company changes a reward.

    Args:
        classifier: a Hugging Face sequence classifier with one or two labels.
        texts: token ids, at least one each.
        compute_dtype: dtype of the matrix products.
    """
    model: Any = classifier
    device = next(model.parameters()).device
    pad = model.config.get_text_config().pad_token_id
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.full((len(texts), int(lengths.max())), pad or 0)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    inputs = {"input_ids": tokens.to(device), "attention_mask": mask.long().to(device)}
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        if hasattr(model, "score"):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            last = torch.tensor([_last(text, pad) for text in texts], device=device)
            logits = model.score(hidden[torch.arange(len(texts), device=device), last])
        else:
            logits = model(**inputs).logits
    logits = logits.float()
    return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]


def bradley_terry(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    preference: Float[Tensor, " batch"],
    margin: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Cross-entropy of preferences, P(chosen > rejected) being sigmoid(chosen - rejected - margin).

    Bradley and Terry 1952, with the margin of Touvron et al. 2023 (arXiv:2307.09288), eq. 2.

    Args:
        chosen: rewards.
        rejected: likewise.
        preference: P(chosen > rejected) as it was labelled.
        margin: by how much the chosen should lead; 0 is plain Bradley-Terry.
    """
    ahead = chosen - rejected - margin
    return -preference * F.logsigmoid(ahead) - (1 - preference) * F.logsigmoid(-ahead)


def _last(text: Sequence[int], pad: int | None) -> int:
    """The place of the last token that is not padding; the first where there is none."""
    return max((place for place, token in enumerate(text) if token != pad), default=0)
