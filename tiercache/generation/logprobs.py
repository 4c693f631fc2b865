"""Log-probabilities of tokens, in fp32, row by row: a whole prompt's would be as large as its logits once more."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from tiercache.generation.answer import TokenLogprob


def logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Of `token` and the `top` likeliest ones, from the logits [vocabulary] of its place."""
    row = logits.float()
    row = row - row.logsumexp(0)
    values, tokens = row.topk(min(top, len(row)))
    likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(row[token]), likeliest)


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of each token from the logits [tokens, vocabulary] of its place."""
    return [logprob(row, token, top) for row, token in zip(logits, tokens, strict=True)]


class LastLogits(transformers.LogitsProcessor):
    """Keeps the logits that the next token is chosen from, as they are before all that comes behind it.

    Attributes:
        row: [vocabulary], fp32.
    """

    def __init__(self) -> None:
        self.row = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, vocabulary] behind `input_ids` [1, length], unchanged."""
        self.row = scores[0]
        return scores
