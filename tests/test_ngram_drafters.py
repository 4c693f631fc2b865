"""Drafters without weights against slow oracles: what they look up, the trees they grow, and the memory they take."""

import gc
import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.draft.base import Context, Drafter, Feedback, TreeBudget
from tiercache.draft.ngram import trigram
from tiercache.draft.ngram.automaton import Automaton
from tiercache.draft.ngram.growth import grow_tree
from tiercache.draft.ngram.lookup import PromptLookup
from tiercache.draft.ngram.rates import HitRates, RankShares
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.registry import LOOKUPS
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_to(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The tokens from the root to a node."""
    return () if node == ROOT else (*tokens_to(tree, tree.parents[node]), tree.tokens[node])


DRAFTERS: dict[str, Callable[[int], Drafter]] = {
    **LOOKUPS,
    "lookup": lambda vocabulary: PromptLookup(window=64),
    "suffix": lambda vocabulary: SuffixAutomaton(limit=256),
    "trigram": lambda vocabulary: AdaptiveTrigram(vocabulary, slots=256),
}


def ranked(before: int, last: int, vocabulary: int) -> list[int]:
    """A target's likeliest tokens after two others."""
    rng = random.Random(7919 * (before % 3) + last)
    return rng.sample(range(max(0, vocabulary - 20), vocabulary), min(8, vocabulary))


def step(drafter: Drafter, context: Context, tree: DraftTree, coming: Sequence[int], *, topk: bool = True) -> None:
    """A pass of a target that says `coming`: up to the token after the accepted ones it is committed and told."""
    path, vocabulary = tree.along(coming), context.vocabulary
    emitted = tuple(coming[: len(path) + 1])
    root = context.tokens[-1]
    pairs = [(context.tokens[-2] if len(context.tokens) > 1 else 0, root)]
    pairs += [(root if p < 0 else tree.tokens[p], token) for token, p in zip(tree.tokens, tree.parents, strict=True)]
    rows = torch.tensor([ranked(*pair, vocabulary) for pair in pairs]) if topk else None
    context.tokens.extend(emitted)
    drafter.observe(Feedback(tree, path, emitted, rows))


def text(vocabulary: int, size: int, seed: int = 0) -> list[int]:
    """What such a target says, mostly its first choice."""
    rng = random.Random(seed)
    tokens = [vocabulary - 1, vocabulary - 2]
    while len(tokens) < size:
        tokens.append(rng.choices(ranked(*tokens[-2:], vocabulary)[:2], (0.9, 0.1))[0])
    return tokens


def run(drafter: Drafter, context: Context, coming: Sequence[int], budget: TreeBudget, **how: Any) -> float:
    """Tokens per pass."""
    at = passes = 0
    while at < len(coming):
        before = len(context.tokens)
        step(drafter, context, drafter.propose(budget), coming[at:], **how)
        at, passes = at + len(context.tokens) - before, passes + 1
    return at / passes


class TestGrow:
    """Against a growth that looks at everything anew for each node."""

    @staticmethod
    def oracle(
        table: dict[int, list[tuple[int, float, float, int]]], budget: TreeBudget, context: Context
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        """By path: (confidence given the parent, merit)."""
        chosen: dict[tuple[int, ...], tuple[float, float, float, int]] = {(): (1.0, 1.0, 1.0, 0)}
        while len(chosen) <= budget.nodes:
            best: tuple[tuple[int, ...], tuple[float, float, float, int]] | None = None
            for path, (_, whole, _, state) in chosen.items():
                if len(path) >= min(budget.depth, context.room - 1):
                    continue
                found = [(t, p, favour, s) for t, p, favour, s in table[state]]
                noise, rest = torch.zeros(len(found) + 1, dtype=torch.float64), 1 - sum(p for _, p, _, _ in found)
                if context.noise is not None:
                    row = context.noise(len(context.tokens) + len(path)).double()
                    noise = torch.tensor(
                        [*(float(row[t]) if t < len(row) else -math.inf for t, *_ in found), 0.5772156649]
                    )
                scores = torch.tensor([*(p for _, p, _, _ in found), max(rest, 1e-300)]).double().log() + noise
                shares = torch.softmax(scores * budget.score_scale, 0).tolist()
                found = [(t, share, f, s) for (t, _, f, s), share in zip(found, shares, strict=False)]
                found.sort(key=lambda c: -c[1] * c[2])
                for token, p, favour, state_behind in found[: budget.width]:
                    grown = (*path, token)
                    if grown in chosen or token >= context.vocabulary or whole * p < max(budget.floor, 1e-30):
                        continue
                    if best is None or whole * p * favour > best[1][2]:
                        best = grown, (p, whole * p, whole * p * favour, state_behind)
            if best is None:
                break
            chosen[best[0]] = best[1]
        return {path: (p, merit) for path, (p, _, merit, _) in chosen.items() if path}

    @given(
        st.integers(0, 10**6),
        st.sampled_from([0, 1, 2, 7, 24]),
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from([0.0, 0.05]),
        st.sampled_from([1, 2, 3, 100]),
        st.booleans(),
        st.sampled_from([1.0, 0.5, 4.0, 32.0]),
    )
    @settings(max_examples=60)
    def test_takes_the_best_nodes(
        self, seed: int, nodes: int, depth: int, width: int, floor: float, room: int, noisy: bool, score_scale: float
    ) -> None:
        rng = random.Random(seed)
        table: dict[int, list[tuple[int, float, float, int]]] = {}
        for state in range(6):
            shares = [rng.random() for _ in range(rng.randrange(5))]
            whole = sum(shares) * rng.uniform(1.0, 2.0)
            tokens = rng.sample(range(8), len(shares))  # 6 and 7 are out of the vocabulary
            rows = [
                (t, share / whole, rng.choice([1.0, 1.5]), rng.randrange(6))
                for t, share in zip(tokens, shares, strict=True)
            ]
            table[state] = sorted(rows, key=lambda c: -c[1] * c[2])
        budget = TreeBudget(nodes, depth=depth, width=width, floor=floor, score_scale=score_scale)
        context = Context([1, 2, 3], 6, noise=GumbelNoise(seed, 6) if noisy else None, room=room)
        tree = grow_tree(0, table.__getitem__, budget, context)
        assert tree.order == ("shared_gumbel" if noisy else "deterministic")
        assert tree.logq is not None
        got = {tokens_to(tree, node): pytest.approx(math.exp(tree.logq[node]), rel=1e-5) for node in range(len(tree))}
        wanted = self.oracle(table, budget, context)
        assert {path: p for path, (p, _) in wanted.items()} == got

    def test_siblings_stand_in_the_order_of_the_noise(self) -> None:
        noise = GumbelNoise(3, 50)
        row = [(token, 1 / 60, 1.0, 0) for token in range(50)]
        tree = grow_tree(0, lambda _: row, TreeBudget(20, depth=1, width=50), Context([7], 50, noise=noise))
        assert list(tree.tokens) == noise(1).topk(20).indices.tolist()


class TestPromptLookup:
    @staticmethod
    def oracle(tokens: list[int], ngram: int, depth: int) -> list[int]:
        for size in range(min(ngram, len(tokens) - 1), 0, -1):
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == tokens[-size:]:
                    copied = list(tokens)
                    for place in range(depth):
                        copied.append(copied[start + size + place])
                    return copied[len(tokens) :]
        return []

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 6))
    def test_copies_what_followed_the_newest_longest_match(self, tokens: list[int], ngram: int, depth: int) -> None:
        drafter, context = PromptLookup(ngram, window=100), Context(tokens[:1], 4)
        drafter.begin(context)
        for size in range(1, len(tokens) + 1):
            context.tokens[:] = tokens[:size]
            drafter.observe(Feedback(DraftTree(), (), ()))
            tree = drafter.propose(TreeBudget(64, depth=depth))
            assert tree.is_chain
            assert list(tree.tokens) == self.oracle(tokens[:size], ngram, depth)

    def test_forgets_what_lies_before_its_window(self) -> None:
        drafter, context = PromptLookup(2, window=4), Context([1, 2, 9], 10)
        drafter.begin(context)
        for token in (3, 4, 5, 6, 7, 8, 1):
            context.tokens.append(token)
            drafter.observe(Feedback(DraftTree(), (), (token,)))
        assert not len(drafter.propose(TreeBudget(4)))  # the first 1 is out of sight
        context.tokens.append(5)
        drafter.observe(Feedback(DraftTree(), (), (5,)))
        assert drafter.propose(TreeBudget(4, depth=2)).tokens == (6, 7)

    def test_its_chance_follows_what_came(self) -> None:
        drafter, context = PromptLookup(1), Context([1, 2, 1], 5)
        drafter.begin(context)
        before = drafter.propose(TreeBudget(1)).logq
        for _ in range(40):
            step(drafter, context, drafter.propose(TreeBudget(1)), [1 if context.tokens[-1] == 2 else 2, 0][:1])
        after = drafter.propose(TreeBudget(1)).logq
        assert before is not None
        assert after is not None
        assert after[0] > before[0]
        assert math.exp(after[0]) > 0.85


class TestAutomaton:
    @given(st.lists(st.integers(0, 2), min_size=1, max_size=28))
    def test_counts_what_followed_the_longest_suffix_seen_before(self, tokens: list[int]) -> None:
        automaton = Automaton()
        for size, token in enumerate(tokens, 1):
            automaton.append(token)
            seen = tokens[:size]
            suffixes = [seen[start:] for start in range(1, size) if self.occurrences(seen, seen[start:]) > 1]
            longest = suffixes[0] if suffixes else []
            state = automaton.link[automaton.last]
            assert automaton.length[state] == len(longest)
            while state > 0:  # and of each shorter suffix that is a state of its own
                suffix = seen[size - automaton.length[state] :]
                assert automaton.count[state] == self.occurrences(seen, suffix)
                counts = Counter(
                    seen[start + len(suffix)]
                    for start in range(size - len(suffix))
                    if seen[start : start + len(suffix)] == suffix
                )
                children, total, several = automaton.children(state, 8)
                assert {t: count for t, _, count in children} == dict(counts)
                assert (total, several) == (sum(counts.values()), len(counts))
                assert automaton.several(state) == several
                assert all(automaton.next(state, t) == found for t, found, _ in children)
                state = automaton.link[state]

    @staticmethod
    def occurrences(tokens: list[int], part: list[int]) -> int:
        return sum(tokens[start : start + len(part)] == part for start in range(len(tokens) - len(part) + 1))

    def test_ranks_many_children_now_and_then(self) -> None:
        tokens = [token for other in range(1, 200) for token in (0, other)]
        tokens += [token for n in range(40) for token in (0, 7, 1000 + n)]
        automaton = Automaton(tokens)
        state = automaton.next(0, 0)
        first = automaton.children(state, 3)
        assert first[0][0][:1] == (7,)
        assert first[1:] == (239, 199)
        automaton.append(0)
        automaton.append(3)
        assert automaton.children(state, 3) is first
        for n in range(60):
            for token in (0, 9, 2000 + n):
                automaton.append(token)
        assert automaton.children(state, 3)[0][0][0] == 9


class TestSuffixAutomaton:
    def test_branches_by_frequency(self) -> None:
        drafter = SuffixAutomaton()
        drafter.begin(Context([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2], 10))
        tree = drafter.propose(TreeBudget(64, depth=1))
        assert tree.logq is not None
        assert tree.tokens[:2] == (3, 4)
        assert tree.logq[0] - tree.logq[1] == pytest.approx(math.log(2))
        assert sum(math.exp(logq) for logq in tree.logq) < 1
        path = drafter.propose(TreeBudget(1 + 2, depth=3)).tokens
        assert path[0] == 3

    def test_longer_matches_allow_more_nodes(self) -> None:
        drafter = SuffixAutomaton()
        drafter.begin(Context([*range(90), 3], 90))
        assert len(drafter.propose(TreeBudget(80, depth=80))) == 32
        drafter.begin(Context([*range(90), 3, 4, 5], 90))
        assert len(drafter.propose(TreeBudget(80, depth=80))) == 64
        assert len(drafter.propose(TreeBudget(2))) == 2

    def test_knows_earlier_sequences_and_goes_on_with_this_one(self) -> None:
        drafter = SuffixAutomaton()
        first = Context([1, 2, 3, 4, 5], 10)
        drafter.begin(first)
        drafter.begin(Context([7, 2, 3], 10))
        assert drafter.propose(TreeBudget(64)).tokens[:2] == (4, 5)
        drafter.begin(Context([7, 2, 3, 8, 6, 2], 10))  # its next turn: what it was is not read twice
        assert drafter._text.tolist() == [1, 2, 3, 4, 5, -1, 7, 2, 3, 8, 6, 2]

    @given(st.integers(0, 1000), st.integers(2, 40))
    def test_keeps_no_more_than_its_limit(self, seed: int, limit: int) -> None:
        drafter, rng = SuffixAutomaton(limit=limit), random.Random(seed)
        context = Context([0], 4)
        for _ in range(3):
            context = Context([rng.randrange(4) for _ in range(rng.randrange(1, 60))], 4)
            drafter.begin(context)
            for _ in range(rng.randrange(30)):
                context.tokens.append(rng.randrange(4))
                drafter.observe(Feedback(DraftTree(), (), context.tokens[-1:]))
        kept = drafter._text.tolist()
        assert len(kept) < limit
        own = min(len(kept), len(context.tokens))
        assert kept[len(kept) - own :] == context.tokens[-own:] or -1 in kept
        assert kept[-1] == context.tokens[-1]
        oracle = Automaton(kept)
        state = oracle.link[oracle.last]
        tree = drafter.propose(TreeBudget(1, depth=1))
        children = [token for token, _, _ in oracle.children(state, 8)[0] if token >= 0] if state > 0 else []
        assert not children or set(tree.tokens) <= {0, 1, 2, 3}
        assert bool(len(tree)) or not children

    def test_how_often_it_is_right_is_measured(self) -> None:
        drafter, rng = SuffixAutomaton(), random.Random(0)
        drafter.begin(Context([rng.randrange(300) for _ in range(3000)] + [5], 300))
        chance = drafter.propose(TreeBudget(64, depth=1)).logq
        assert chance is not None
        assert max(map(math.exp, chance)) < 0.1  # matches in noise are worth nothing
        drafter.begin(Context([*range(50)] * 40, 300))
        chance = drafter.propose(TreeBudget(1)).logq
        assert chance is not None
        assert math.exp(chance[0]) > 0.9


class TestRecycling:
    @given(st.integers(0, 10**6))
    @settings(max_examples=30)
    def test_the_table_is_what_was_ranked_last(self, seed: int) -> None:
        rng = random.Random(seed)
        drafter, context = TokenRecycling(9), Context([rng.randrange(9)], 9)
        drafter.begin(context)
        oracle: dict[int, list[int]] = {}
        for _ in range(6):
            tree = drafter.propose(TreeBudget(rng.choice([0, 3, 12]), depth=3))
            for node, parent in enumerate(tree.parents):
                before = context.tokens[-1] if parent < 0 else tree.tokens[parent]
                assert tree.tokens[node] in oracle[before]
            coming = [rng.randrange(9) for _ in range(4)]
            path = tree.along(coming)
            rows = [rng.sample(range(9), 8) for _ in range(1 + len(tree))]
            order = [*range(1 + len(tree)), 0, *(node + 1 for node in path)]
            for row in order:  # of one token, what holds of the text counts
                oracle[[context.tokens[-1], *tree.tokens][row]] = rows[row]
            emitted = tuple(coming[: len(path) + 1])
            context.tokens.extend(emitted)
            drafter.observe(Feedback(tree, path, emitted, torch.tensor(rows)))
            table = drafter._table.tolist()
            assert {token: row for token, row in enumerate(table) if row[0] >= 0} == oracle

    def test_a_prompt_tells_of_its_last_tokens(self) -> None:
        drafter, context = TokenRecycling(9), Context([5, 6, 7], 9)
        drafter.begin(context)
        context.tokens.append(8)
        rows = torch.tensor([[1, 2], [3, 4]])
        drafter.observe(Feedback(DraftTree(), (), (8,), rows))
        table = drafter._table.tolist()
        assert table[6][:3] == [1, 2, -1]
        assert table[7][:3] == [3, 4, -1]
        assert table[5] == table[8] == [-1] * 8

    def test_ranks_are_taken_by_how_often_they_came_true(self) -> None:
        drafter, context = TokenRecycling(30), Context([0], 30)
        drafter.begin(context)
        for _ in range(120):  # what comes is always what was ranked third
            context.tokens.append((context.tokens[-1] + 3) % 30)
            row = [(context.tokens[-2] + rank) % 30 for rank in (1, 2, 3, 4, 5, 6, 7, 8)]
            drafter.observe(Feedback(DraftTree(), (), context.tokens[-1:], torch.tensor([row])))
        last = context.tokens[-1]
        assert drafter.propose(TreeBudget(3, depth=3)).tokens == tuple((last + 3 * n) % 30 for n in (1, 2, 3))


class TestTrigram:
    def test_rows_move_towards_what_the_target_says(self) -> None:
        """Against the same sums in plain Python."""
        drafter, context = AdaptiveTrigram(11, slots=1 << 12), Context([0, 1], 11)
        drafter.begin(context)
        rng, oracle, visits = random.Random(1), dict[tuple[int, int], dict[int, float]](), Counter[tuple[int, int]]()
        for _ in range(60):
            pair = tuple(context.tokens[-2:])
            row = rng.sample(range(11), 5)
            context.tokens.append(rng.randrange(2))
            drafter.observe(Feedback(DraftTree(), (), context.tokens[-1:], torch.tensor([row])))
            newest = max(1 / (1 + visits[pair]), 0.25)
            mixed = {token: share * (1 - newest) for token, share in oracle.get(pair, {}).items()}
            for token, share in zip(row, drafter._ranks.shares(), strict=False):
                mixed[token] = mixed.get(token, 0.0) + newest * share
            visits[pair] += 1
            oracle[pair] = dict(sorted(mixed.items(), key=lambda item: -item[1])[:8])
        tokens = context.tokens
        tree = drafter.propose(TreeBudget(8, depth=1))
        assert tree.logq is not None
        wanted = oracle[tokens[-2], tokens[-1]]
        assert set(tree.tokens) == wanted.keys()
        for token, logq in zip(tree.tokens, tree.logq, strict=True):
            assert math.exp(logq) == pytest.approx(wanted[token], rel=1e-4)

    def test_is_curious_about_what_it_never_saw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def tree(exploration: float) -> DraftTree:
            monkeypatch.setattr(trigram, "_EXPLORATION", exploration)
            drafter, context = AdaptiveTrigram(9), Context([1, 2], 9)
            drafter.begin(context)
            for turn in range(24):  # after 1 2 comes 3, now and then 4; what comes after 2 3 is known
                context.tokens[:] = [1, 2, 3 + (turn % 3 == 0)]
                drafter.observe(Feedback(DraftTree(), (), context.tokens[-1:], torch.tensor([[3, 4]])))
                context.tokens[:] = [1, 2, 3, 5]
                drafter.observe(Feedback(DraftTree(), (), (5,), torch.tensor([[5, 6]])))
            context.tokens[:] = [1, 2]
            return drafter.propose(TreeBudget(1, depth=1))

        assert tree(0.0).tokens == (3,)
        assert tree(9.0).tokens == (4,)

    def test_learns_of_the_prompt_and_of_what_came_where_nothing_is_ranked(self) -> None:
        drafter, context = AdaptiveTrigram(9), Context([1, 2, 3, 4, 1, 2], 9)
        drafter.begin(context)
        assert drafter.propose(TreeBudget(2)).tokens == (3, 4)
        context.tokens.extend([8, 1, 2])
        drafter.observe(Feedback(DraftTree(), (), (8, 1, 2)))
        context.tokens.append(8)
        drafter.observe(Feedback(DraftTree(), (), (8,)))
        assert drafter.propose(TreeBudget(1)).tokens == (1,)

    def test_newer_pairs_take_the_places_of_older_ones(self) -> None:
        drafter = AdaptiveTrigram(1000, slots=2)
        drafter.begin(Context(list(range(300)), 1000))
        pairs = [divmod(pair, 1000) for pair in drafter._pairs.tolist()]
        assert len(pairs) == 2
        assert [row[:2] for row in drafter._tokens.tolist()] == [[last + 1, -1] for _, last in pairs]  # of them alone
        assert drafter._visits.tolist() == [1, 1]


@pytest.mark.parametrize("name", DRAFTERS)
class TestEach:
    def legal(self, tree: DraftTree, budget: TreeBudget, context: Context) -> None:
        assert len(tree) <= budget.nodes
        assert max(tree.depths, default=0) <= min(budget.depth, context.room - 1)
        assert all(0 <= token < context.vocabulary for token in tree.tokens)
        pairs = list(zip(tree.parents, tree.tokens, strict=True))
        assert len(set(pairs)) == len(pairs)
        assert all(len(children) <= budget.width for children in tree.children.values())
        if not len(tree):
            return
        assert tree.logq is not None
        assert all(logq <= 1e-6 for logq in tree.logq)
        whole: list[float] = []
        for parent, logq in zip(tree.parents, tree.logq, strict=True):
            whole.append((1.0 if parent < 0 else whole[parent]) * math.exp(logq))
        assert all(p >= budget.floor * (1 - 1e-9) for p in whole)

    @pytest.mark.parametrize("vocabulary", [5, 300, 128_000])
    @pytest.mark.parametrize("noisy", [False, True])
    def test_trees_stay_within_their_budgets(self, name: str, vocabulary: int, noisy: bool) -> None:
        drafter = DRAFTERS[name](vocabulary)
        rng = random.Random(vocabulary)
        noise = GumbelNoise(1, vocabulary) if noisy else None
        sizes = [len(text(vocabulary, 40))]
        for turn in range(3):  # begun again and again
            tokens = text(vocabulary, 40, seed=turn % 2)
            context = Context(tokens[: 1 + 20 * turn], vocabulary, noise=noise)
            drafter.begin(context)
            for at in range(1 + 20 * turn, 40, 2):
                budget = TreeBudget(
                    rng.choice([0, 1, 2, 7, 64]), depth=rng.choice([1, 2, 5]), width=rng.choice([1, 8]),
                    floor=rng.choice([0.0, 0.01]),
                )  # fmt: skip
                context.room = rng.choice([1, 2, 100])
                tree = drafter.propose(budget)
                sizes.append(len(tree))
                self.legal(tree, budget, context)
                step(drafter, context, tree, tokens[at : at + 1])
        assert max(sizes[1:]) > 1

    def test_survives_what_no_tokenizer_has(self, name: str) -> None:
        drafter = DRAFTERS[name](5)
        for history in ([4], [2**31 + 1, 2**40, 2**40, 1, 2**40], [10**6, 3, 3, 3]):
            context = Context(list(history), 5)
            drafter.begin(context)
            for _ in range(4):
                tree = drafter.propose(TreeBudget(8))
                self.legal(tree, TreeBudget(8), context)
                strange = DraftTree((2**40, 3, 3), (-1, -1, 0))  # another's
                context.tokens.append(3)
                drafter.observe(Feedback(strange, (1,), (3,), torch.tensor([[1, 2]] * 4)))
            drafter.observe(Feedback(DraftTree(), (), ()))  # nothing came

    @pytest.mark.parametrize("topk", [True, False])
    def test_it_pays(self, name: str, topk: bool) -> None:
        if name == "recycling" and not topk:
            return  # it has nothing else
        tokens = text(30, 700)
        drafter, context = DRAFTERS[name](30), Context(tokens[:2], 30)
        drafter.begin(context)
        run(drafter, context, tokens[2:400], TreeBudget(16), topk=topk)
        assert run(drafter, context, tokens[400:], TreeBudget(16), topk=topk) > 1.5

    def test_takes_no_more_memory_than_it_says(self, name: str) -> None:
        sizes: dict[str, tuple[Callable[[], Drafter], list[list[int]]]] = {
            "lookup": (lambda: PromptLookup(window=2048), [[1, 2] * 3000]),
            # Two tokens at random make the most states, many the largest root.
            "suffix": (
                lambda: SuffixAutomaton(limit=4096),
                [[random.Random(1).getrandbits(1) for _ in range(4090)], [10**6 * n for n in range(6000)]],
            ),
            "recycling": (lambda: TokenRecycling(50_000), [text(200, 300)]),
            "trigram": (lambda: AdaptiveTrigram(50_000, slots=1 << 12), [text(200, 300)]),
        }
        make, texts = sizes[name]
        make()  # what is made once for all is made
        for tokens in texts:
            context = Context(tokens, 50_000)
            gc.collect()
            tracemalloc.start()
            drafter = make()
            drafter.begin(context)
            tree = drafter.propose(TreeBudget(64))
            drafter.observe(Feedback(tree, (), (), torch.zeros(1 + len(tree), 8, dtype=torch.int64)))
            held, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert held <= drafter.requirements.host_bytes
            assert peak <= drafter.requirements.host_bytes + 500_000  # of a pass, and freed again
            assert drafter.requirements.host_bytes < 12 * held + 200_000


def test_arguments_that_cannot_be_meant() -> None:
    for make in (
        lambda: PromptLookup(0),
        lambda: PromptLookup(window=0),
        lambda: SuffixAutomaton(limit=1),
        lambda: TokenRecycling(0),
        lambda: AdaptiveTrigram(0),
        lambda: AdaptiveTrigram(5, slots=1),
    ):
        with pytest.raises(UsageError):
            make()


def test_shares_fade() -> None:
    rates, ranks = HitRates([0.5]), RankShares([0.5, 0.1])
    for _ in range(1000):
        rates.add(0, True)
        ranks.add(1)
    assert rates[0] > 0.98
    assert ranks.shares()[1] > 0.98
    for _ in range(600):
        rates.add(0, False)
        ranks.add(None)
    assert rates[0] < 0.15
    assert ranks.shares()[1] < 0.5
    assert sum(ranks.shares()) <= 1
