"""Names the drafters that look tokens up. A new one is a file in `draft/ngram/` and a line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tiercache.draft.base import Drafter
from tiercache.draft.ngram.lookup import PromptLookup
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram

LOOKUPS: Mapping[str, Callable[[int], Drafter]] = MappingProxyType(
    {
        "lookup": lambda vocabulary: PromptLookup(),
        "suffix": lambda vocabulary: SuffixAutomaton(),
        "recycling": TokenRecycling,
        "trigram": AdaptiveTrigram,
    }
)
"""By name, what makes one for a vocabulary of so many tokens; it has learnt nothing yet."""
