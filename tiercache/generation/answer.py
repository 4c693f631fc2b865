"""What comes of a request: pieces of text while it is written, the answer at the end. Plain data."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token: which one.
        logprob: its natural log-probability; None for the first token of a text, which nothing predicts.
        top: the likeliest tokens with theirs, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, with the tokens that it came from.

    Some tokens bring no text of their own: half a character, or the beginning of what may be a stop string.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class PassProgress:
    """How far the pass under way has come.

    Attributes:
        phase: the prompt's pass, or a later one.
        layer, layers: decoder layers that it has done, of all.
        tokens: prompt tokens of the prefill, kept ones left out; or new tokens so far.
    """

    phase: Literal["prefill", "decode"]
    layer: int
    layers: int
    tokens: int


@dataclass(frozen=True)
class Answer:
    """The whole answer.

    Attributes:
        text: without the stop string that ended it.
        tokens: every new token, that which ended the text included.
        finish_reason: "stop" at the end of the text or a stop string, "length" at the most tokens, "cancelled".
        prompt_tokens: of the request.
        reused_tokens: those of them whose keys and values were kept from the answer before.
        first_token_s: seconds to the first new token; None where none came.
        seconds: in all.
        logprobs: of each new token, if they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    first_token_s: float | None
    seconds: float
    logprobs: tuple[TokenLogprob, ...] = ()
