"""Drafts by learned tables: n-gram counts of everything emitted, also by earlier runs."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from tiercache.draft.base import DrafterRequirements, TreeBudget
from tiercache.draft.ngram.counts import KEPT_TOKENS, LONGEST, Counts, CountStore, Gram
from tiercache.draft.ngram.follow import Follower
from tiercache.draft.ngram.growth import Continuation, grow_tree
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError

_CACHED = 1024  # n-grams whose continuations are kept at hand
_CACHED_BYTES = 2560  # of one of them
_PENDING_BYTES = 1600  # of a token while it is counted, with its three n-grams


class Learned(Follower):
    """Follows n-gram counts that outlive the process, as REST (arXiv 2311.08252) follows its datastore.

    The longest of the n-grams of 3, 2 and 1 tokens that is known is continued by frequency; what it leaves open, by the
    number of different tokens that followed it (escape method C of PPM; Moffat, 1990), is filled in from the shorter
    ones. Only what was emitted is counted, not prompts. The counts are put into LMDB by the batch and when it is
    closed; what a killed process had not yet put there is lost, and nothing else.

    LMDB's map of the file is the system's page cache and counts as no memory here.

    Args:
        folder: of the tables; made if there is none.
        identity: whose tokens these are: the name or digest of the tokenizer or model.
        vocabulary: of the target.
        batch: tokens that are put there at once.
        max_bytes: of the file, when it is made.

    Raises:
        StoreError, EnvironmentUnsupportedError, UsageError: as `CountStore` says; `batch` is not positive.
    """

    name = "learned"
    open_ended = True

    def __init__(
        self, folder: Path, *, identity: str, vocabulary: int, batch: int = 1024, max_bytes: int = 1 << 28
    ) -> None:
        if batch < 1 or not 1 <= vocabulary < 1 << 31:
            raise UsageError(f"learned tables of {vocabulary} tokens in batches of {batch}; give positive numbers")
        self._store = CountStore(folder, identity=identity, vocabulary=vocabulary, max_bytes=max_bytes)
        self._vocabulary, self._batch = vocabulary, batch
        self._cache: dict[Gram, list[Continuation[Gram]]] = {}
        # Stretches of text to be counted, the present sequence's last: (tokens, how many of them only come before).
        self._pending: list[tuple[list[int], int]] = []
        self._waiting = 0
        self._closed = False
        self.requirements = DrafterRequirements(host_bytes=_CACHED * _CACHED_BYTES + batch * _PENDING_BYTES + 65536)

    def propose(self, budget: TreeBudget) -> DraftTree:
        """See `Drafter`.

        Raises:
            StoreError: the tables are damaged.
            ClosedError: it was closed.
        """
        cache = self._cache
        with self._store.reading() as counts:

            def expand(gram: Gram) -> list[Continuation[Gram]]:
                found = cache.get(gram)
                if found is None:
                    if len(cache) >= _CACHED:
                        cache.clear()
                    found = cache[gram] = self._continuations(gram, counts)
                return found

            return grow_tree(tuple(self.context.tokens[-LONGEST:]), expand, budget, self.context)

    def commit(self) -> None:
        """Put what was counted where it is kept.

        Raises:
            StoreError: the tables are damaged.
            EnvironmentUnsupportedError: the disk is full, or no longer writable.
            ClosedError: it was closed.
        """
        counted: dict[Gram, dict[int, int]] = defaultdict(dict)
        for tokens, given in self._pending:
            for place in range(given, len(tokens)):
                token = tokens[place]
                for size in range(1, min(place, LONGEST) + 1):
                    gram = tuple(tokens[place - size : place])
                    if self._known(token, *gram):
                        counted[gram][token] = counted[gram].get(token, 0) + 1
        if counted:
            self._store.add(counted)
        self._cache.clear()  # another process may have added, too
        self._pending = [_given(self._pending[-1][0])] if self._pending else []
        self._waiting = 0

    def close(self) -> None:
        """See `Drafter`; raises what `commit` does."""
        if not self._closed:
            self._closed = True
            try:
                self.commit()
            finally:
                self._store.close()

    def _continuations(self, gram: Gram, counts: Callable[[Gram], Counts]) -> list[Continuation[Gram]]:
        found: dict[int, float] = {}
        left = 1.0
        for size in range(len(gram), 0, -1):
            suffix = gram[-size:]
            known = counts(suffix) if self._known(*suffix) else []
            if known:
                share = left / (sum(map(itemgetter(1), known)) + len(known))
                for token, count in known:
                    if token not in found:
                        found[token] = share * count
                left = share * len(known)
        ranked = sorted(found.items(), key=itemgetter(1), reverse=True)[:KEPT_TOKENS]
        return [(token, share, 1.0, (*gram, token)[-LONGEST:]) for token, share in ranked]

    def _known(self, *tokens: int) -> bool:
        return min(tokens) >= 0 and max(tokens) < self._vocabulary

    def _enter(self, tokens: Sequence[int]) -> None:
        if self._pending and len(self._pending[-1][0]) == self._pending[-1][1]:
            self._pending.pop()  # nothing of it is to be counted
        self._pending.append(_given(tokens))

    def _append(self, tokens: Sequence[int]) -> None:
        self._pending[-1][0].extend(tokens)
        self._waiting += len(tokens)
        if self._waiting >= self._batch:
            self.commit()


def _given(tokens: Sequence[int]) -> tuple[list[int], int]:
    before = list(tokens[-LONGEST:])
    return before, len(before)
