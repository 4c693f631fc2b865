"""The model that is served, and what it may be asked for. Plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tiercache.compat import sampling_defaults
from tiercache.generation.answer import Answer, PassProgress, Piece, TokenLogprob
from tiercache.generation.request import GenerationRequest


class Generator(Protocol):
    """What serving needs of `tiercache.generation`'s `TextGenerator`."""

    context: int

    def generate(
        self,
        request: GenerationRequest,
        *,
        emit: Callable[[Piece], None],
        cancelled: Callable[[], bool],
        progress: Callable[[PassProgress], None],
    ) -> Answer:
        """Write one answer."""
        ...

    def score(
        self,
        ids: tuple[int, ...],
        top: int,
        *,
        cancelled: Callable[[], bool],
        progress: Callable[[PassProgress], None],
    ) -> tuple[TokenLogprob, ...]:
        """How likely each token of a text is."""
        ...


@dataclass(frozen=True)
class Defaults:
    """How an answer is sampled where the request does not say.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k: of sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of_checkpoint(cls, generation_config: Any) -> "Defaults":
        """What the checkpoint suggests: its own sampling, or none, as transformers' `generate` has it."""
        if not getattr(generation_config, "do_sample", False):
            return cls()
        defaults = sampling_defaults()
        found = {name: getattr(generation_config, name, None) for name in defaults}
        return cls(**(defaults | {name: value for name, value in found.items() if value is not None}))


@dataclass(frozen=True)
class Served:
    """One model.

    Attributes:
        name: what requests call it.
        generator: answers, one request at a time.
        tokenizer: the model's.
        vocabulary: token ids are below it.
        statistics: what `model.tiercache.stats().to_dict()` returns; asked by the thread that generates.
        defaults: of sampling.
        max_tokens: new tokens of one answer at most.
        created: when it was opened, in seconds since 1970.
    """

    name: str
    generator: Generator
    tokenizer: Any
    vocabulary: int
    statistics: Callable[[], dict[str, Any]]
    defaults: Defaults
    max_tokens: int
    created: int
