"""What one answer is asked for. Knows numbers and texts; no model."""

from dataclasses import dataclass

from tiercache.errors import UsageError


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, and how it is answered.

    Attributes:
        ids: tokens of the whole prompt.
        max_new_tokens: of the answer at most.
        temperature: 0 takes the likeliest token.
        top_p, top_k: sample among the likeliest tokens of this total probability, and of this number; 0 for all.
        seed: of the sampling; None goes on with torch's generator.
        stop: texts that end the answer and are no part of it.
        logprobs: log-probabilities of each new token and of so many likeliest ones are wanted; None for none.

    Raises:
        UsageError: a value that cannot be meant.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise UsageError("the prompt holds no token to start from; give some text")
        if self.max_new_tokens < 1:
            raise UsageError(f"{self.max_new_tokens} new tokens are no answer; ask for 1 or more")
        if not self.temperature >= 0:
            raise UsageError(f"temperature {self.temperature} is below 0; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is no share of probability; give one above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is below 0; 0 samples among all tokens")
        if "" in self.stop:
            raise UsageError("an empty stop string would end every answer; leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"{self.logprobs} log-probabilities a token are below 0; give 0 or more")

    @property
    def sampling(self) -> dict[str, float | int | bool | None]:
        """Arguments of `generate`; None keeps what the checkpoint suggests for sampling out of a greedy answer."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
