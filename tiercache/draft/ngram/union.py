"""The union of the usual drafters without weights."""

from pathlib import Path

from tiercache.draft.base import Drafter
from tiercache.draft.ngram.learned import Learned
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram
from tiercache.draft.union import Union


class Ngrams(Union):
    """The usual drafters without weights: suffix automaton, token recycling, adaptive tri-gram, learned tables.

    Args:
        vocabulary: of the target.
        identity: of its tokenizer or model, for learned tables.
        folder: of the learned tables; there are none without it.

    Raises:
        StoreError, EnvironmentUnsupportedError, UsageError: as these drafters say.
    """

    name = "ngram"

    def __init__(self, vocabulary: int, identity: str, *, folder: Path | None = None) -> None:
        drafters: list[Drafter] = [SuffixAutomaton(), AdaptiveTrigram(vocabulary), TokenRecycling(vocabulary)]
        if folder is not None:
            drafters.append(Learned(folder, identity=identity, vocabulary=vocabulary))
        super().__init__(drafters)
