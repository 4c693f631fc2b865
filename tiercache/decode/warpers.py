"""Logits processors of transformers, applied sooner where the same comes of it.

Knows transformers' processors; it does not know requests or trees.
"""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tiercache.tiers.device import on_host


def processed(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """What `processor` makes of scores [1, vocabulary] after a text [1, length]."""
    if type(processor) is transformers.TopPLogitsWarper and on_host(scores.device) and scores.dtype == torch.float32:
        return _top_p(processor, scores)
    found: Tensor = processor(ids, scores)
    return found


def _top_p(warper: transformers.TopPLogitsWarper, scores: Tensor) -> Tensor:
    """As `warper` does, without the order of the tokens: of a vocabulary, numpy sorts the scores alone far sooner.

    Where the bound falls among equal scores, torch's own order decides which of them stay.
    """
    ordered = torch.from_numpy(np.sort(scores.numpy(force=True)))
    removed = ordered.softmax(-1).cumsum(-1) <= (1 - warper.top_p)
    removed[..., -warper.min_tokens_to_keep :] = False
    count = int(removed.sum())
    if count == 0:
        return scores
    last, first = ordered[0, count - 1 : count + 1].tolist()  # that goes, and that stays
    if last == first or not removed[0, count - 1]:
        found: Tensor = warper(None, scores)
        return found
    return scores.masked_fill(scores < first, warper.filter_value)
