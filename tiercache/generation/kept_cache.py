"""The KV cache of the last text, for a prompt that goes on from it. Knows tokens and caches; no passes."""

from collections.abc import Callable, Sequence

import transformers

from tiercache.compat import DynamicCache
from tiercache.kv.cache import TreeCache, cut


class KeptCache:
    """Hands out the KV cache of a prompt: that of the text before, where the prompt is the next turn of the same chat.

    That is so if the prompt begins with the prompt before, and goes on. The same prompt again, or another chat with the
    same beginning, gets an empty cache: a prompt that is prefilled in two parts may differ in the last bits from one
    that is prefilled at once, and what is asked twice should be answered alike.

    Args:
        make: an empty cache; None where none can be gone on from.

    Attributes:
        prompt: how many of the tokens that are kept were the prompt.
    """

    def __init__(self, make: Callable[[], transformers.Cache | None]) -> None:
        self._make = make
        self._cache: transformers.Cache | None = None
        self._tokens: list[int] = []  # whose keys and values it holds
        self.prompt = 0

    def take(self, ids: Sequence[int]) -> tuple[transformers.Cache | None, int]:
        """A cache that holds the first tokens of a prompt, and how many; until `keep` it is not kept any more.

        The last token of the prompt is never among them, for its pass predicts the answer. None where no cache can be
        gone on from.
        """
        same = next((n for n, (kept, new) in enumerate(zip(self._tokens, ids, strict=False)) if kept != new), None)
        shared = min(len(self._tokens), len(ids)) if same is None else same
        cache, goes_on = self._cache, self.prompt <= shared and self.prompt < len(ids)
        self.forget()
        shared = min(shared, len(ids) - 1)
        if cache is not None and goes_on and cut(cache, shared):
            return cache, shared
        return self._make(), 0

    def keep(self, cache: transformers.Cache | None, tokens: Sequence[int], prompt: int) -> None:
        """Keep a cache that holds `tokens`, the first `prompt` of which were the prompt, and may hold more."""
        if cache is not None and tokens and cut(cache, len(tokens)):
            self._cache, self._tokens, self.prompt = cache, list(tokens), prompt

    def forget(self) -> None:
        """Keep nothing."""
        self._cache, self._tokens, self.prompt = None, [], 0


def empty_cache(model: transformers.PreTrainedModel, slots: int | None) -> transformers.Cache:
    """One that `model.generate` goes on from: transformers' own, or with `slots` one for trees of drafts."""
    if slots is not None:
        return TreeCache(slots)
    return DynamicCache(config=model.config.get_text_config(decoder=True))
