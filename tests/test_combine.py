"""Drafters of several drafters: merged trees, shared nodes, and who is asked."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.draft.base import Context, Drafter, DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.cascade import Cascade, expected_accepted
from tiercache.draft.ngram.lookup import PromptLookup
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.union import Ngrams
from tiercache.draft.tree import ROOT, DraftTree, chain
from tiercache.draft.union import Union
from tiercache.errors import DraftError, StoreError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed(Drafter):
    """Proposes what it was given, as far as the budget goes, and tells what it was asked and told."""

    passes = 1

    def __init__(self, tree: DraftTree, *, wants: DrafterRequirements | None = None, name: str = "fixed") -> None:
        self.tree, self.name, self.requirements = tree, name, wants or DrafterRequirements()
        self.asked: list[int] = []
        self.told: list[Any] = []

    def propose(self, budget: TreeBudget) -> DraftTree:
        self.asked.append(budget.nodes)
        return self.tree.pruned(range(min(budget.nodes, len(self.tree))))

    def observe(self, feedback: Feedback) -> None:
        self.told.append(feedback)

    def close(self) -> None:
        self.told.append("closed")
        if self.name == "bad":
            raise StoreError("cannot close")


def tokens_to(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The tokens from the root to a node."""
    return () if node == ROOT else (*tokens_to(tree, tree.parents[node]), tree.tokens[node])


def paths(tree: DraftTree) -> dict[tuple[int, ...], int]:
    """Each node by its tokens from the root."""
    return {tokens_to(tree, node): node for node in range(len(tree))}


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Without equal siblings, as drafters make them."""
    found: dict[tuple[int, int], float] = {}
    for node in range(draw(st.integers(0, 12))):
        key = draw(st.integers(-1, node - 1)), draw(st.integers(0, 3))
        if key[0] < len(found):
            found.setdefault(key, draw(st.floats(-3, 0)))
    keys = list(found)
    return DraftTree(tuple(t for _, t in keys), tuple(p for p, _ in keys), logq=tuple(found.values()))


class TestUnion:
    @given(st.lists(trees(), min_size=1, max_size=4))
    @settings(max_examples=60)
    def test_the_same_path_is_the_same_node(self, given_trees: list[DraftTree]) -> None:
        union = Union([Fixed(tree) for tree in given_trees])
        union.begin(Context([1], 4))
        tree = union.propose(TreeBudget(1000))
        assert tree.logq is not None
        by_path = paths(tree)
        assert len(by_path) == len(tree)
        parts, highest = [paths(part) for part in given_trees], {}
        assert by_path.keys() == set().union(*parts)
        for path, node in by_path.items():
            having = [number for number, part in enumerate(parts) if path in part]
            assert union._merged.owners[node] == set(having)
            chances = [(given_trees[number].logq or ())[parts[number][path]] for number in having]
            highest[path] = max(chances)
        for path, node in by_path.items():
            beside = sum(math.exp(logq) for other, logq in highest.items() if other[:-1] == path[:-1])
            assert tree.logq[node] == pytest.approx(highest[path] - math.log(max(1.0, beside)))

    @given(st.lists(trees(), min_size=2, max_size=4), st.integers(0, 9))
    @settings(max_examples=40)
    def test_never_more_nodes_than_there_are(self, given_trees: list[DraftTree], nodes: int) -> None:
        union = Union([Fixed(tree) for tree in given_trees])
        union.begin(Context([1], 4))
        for _ in range(3):
            tree = union.propose(TreeBudget(nodes))
            assert len(tree) <= nodes
            assert len(tree) >= min(nodes, len(given_trees[-1]), 1)
            union.observe(Feedback(tree, (), (tree.tokens[:1] or (0,))))

    def test_nodes_go_where_they_pay(self) -> None:
        good, bad = Fixed(chain([1] * 40, [-0.1] * 40)), Fixed(chain([2] * 40, [-0.1] * 40))
        union = Union([bad, good])
        union.begin(Context([1], 4))
        for _ in range(40):
            tree = union.propose(TreeBudget(20))
            union.observe(Feedback(tree, (), (1,) * 15))
        assert good.asked[0] == bad.asked[0] == 10
        assert good.asked[-1] >= 18
        assert len(bad.asked) == 40
        assert 1 <= bad.asked[-1] <= 2  # still tried, lest its day come
        for _ in range(40):
            union.propose(TreeBudget(20))
            union.observe(Feedback(DraftTree(), (), (2,) * 15))  # whoever's tree was verified
        assert bad.asked[-1] >= 18

    def test_what_one_leaves_goes_to_the_next(self) -> None:
        short, long = Fixed(chain([1, 2], [-0.1, -0.1])), Fixed(chain([3] * 40, [-0.1] * 40))
        union = Union([short, long])
        union.begin(Context([1], 4))
        assert len(union.propose(TreeBudget(20))) == 20
        assert union.passes == 2
        assert not len(union.propose(TreeBudget(0)))
        assert union.passes == 0

    def test_orders_and_chances(self) -> None:
        noisy = DraftTree((1,), (-1,), "shared_gumbel", logq=(-1.0,))
        plain, unscored = chain([2], [-1.0]), chain([3])
        drawn = DraftTree((1,), (-1,), "without_replacement", {-1: torch.tensor([0.5, 0.5])})
        for parts, order in (([noisy, noisy], "shared_gumbel"), ([noisy, plain], "deterministic")):
            union = Union([Fixed(part) for part in parts])
            assert union.propose(TreeBudget(4)).order == order
        assert Union([Fixed(plain), Fixed(unscored)]).propose(TreeBudget(4)).logq is None
        assert Union([Fixed(plain), Fixed(DraftTree())]).propose(TreeBudget(4)).logq == (-1.0,)
        with pytest.raises(DraftError, match="draws its nodes"):
            Union([Fixed(drawn)]).propose(TreeBudget(4))

    def test_passes_everything_on(self) -> None:
        vocabulary = DrafterRequirements(topk=8, vocabulary=9, host_bytes=5)
        heads = DrafterRequirements(topk=2, logits=True, device_bytes=7, host_bytes=1)
        one, two = (
            Fixed(chain([1]), wants=vocabulary, name="one"),
            Fixed(chain([2]), wants=heads, name="two"),
        )
        union = Union([one, two])
        assert union.requirements == DrafterRequirements(8, True, False, 9, 7, 6)
        union.begin(context := Context([1], 4))
        assert one.context is two.context is context
        feedback = Feedback(union.propose(TreeBudget(4)), (0,), (1,))
        union.observe(feedback)
        assert one.told == two.told == [feedback]

    def test_closes_all_whatever_one_raises(self) -> None:
        one, bad, two = (Fixed(chain([1]), name=name) for name in ("one", "bad", "two"))
        with pytest.raises(StoreError, match="cannot close"):
            Union([one, bad, two]).close()
        assert one.told == bad.told == two.told == ["closed"]

    def test_refuses_what_does_not_go_together(self) -> None:
        with pytest.raises(UsageError, match="no drafters"):
            Union([])
        with pytest.raises(UsageError, match="vocabulary"):
            Union(
                [
                    Fixed(chain([1]), wants=DrafterRequirements(vocabulary=5)),
                    Fixed(chain([1]), wants=DrafterRequirements(vocabulary=6)),
                ]
            )


class TestCascade:
    def test_the_first_that_is_sure_wins(self) -> None:
        unsure, sure = Fixed(chain([1, 2], [-2.0, -0.1])), Fixed(chain([3, 4], [-0.1, -0.1]))
        last = Fixed(chain([5, 6, 7], [-0.01] * 3))
        cascade = Cascade([unsure, sure, last], 1.5)
        cascade.begin(Context([1], 9))
        assert cascade.propose(TreeBudget(8)).tokens == (3, 4)
        assert cascade.passes == 2
        assert not last.asked
        assert Cascade([unsure, sure, last], 2.0).propose(TreeBudget(8)).tokens == (5, 6, 7)
        assert Cascade([unsure, sure, last], 0.0).propose(TreeBudget(8)).tokens == (1, 2)

    def test_the_surest_where_none_is_sure(self) -> None:
        drafters = [Fixed(chain([n], [logq])) for n, logq in ((1, -2.0), (2, -0.1), (3, -1.0))]
        assert Cascade([*drafters, Fixed(DraftTree())], 9.0).propose(TreeBudget(8)).tokens == (2,)
        assert not len(Cascade([Fixed(DraftTree())], 0.0).propose(TreeBudget(8)))

    def test_goes_by_length_where_there_are_no_chances(self) -> None:
        assert Cascade([Fixed(chain([1])), Fixed(chain([2, 3]))], 1.0).propose(TreeBudget(8)).tokens == (2, 3)

    def test_refuses_a_threshold_that_is_none(self) -> None:
        for wrong in (-1.0, math.nan):
            with pytest.raises(UsageError, match="threshold"):
                Cascade([Fixed(chain([1]))], wrong)

    def test_expected_tokens(self) -> None:
        half = math.log(0.5)
        assert expected_accepted(DraftTree((1, 2, 3), (-1, 0, -1), logq=(half, half, half))) == pytest.approx(1.25)
        assert expected_accepted(DraftTree((1, 2, 3), (-1, 0, -1))) == 2
        assert expected_accepted(DraftTree()) == 0


class TestNgrams:
    def test_is_what_it_says(self, tmp_path: Path) -> None:
        with_tables = Ngrams(50, "toy", folder=tmp_path)
        assert [drafter.name for drafter in with_tables.drafters] == ["suffix", "trigram", "recycling", "learned"]
        assert with_tables.requirements.topk == 8
        assert with_tables.requirements.host_bytes == sum(
            drafter.requirements.host_bytes for drafter in with_tables.drafters
        )
        with_tables.close()
        with_tables.close()
        assert len(Ngrams(50, "toy").drafters) == 3

    def test_is_better_than_its_parts(self) -> None:
        """Against a target with habits, half of whose text repeats."""
        rng = random.Random(0)
        likeliest = [[rng.sample(range(40), 8) for _ in range(40)] for _ in range(2)]
        tokens = [0, 1]
        while len(tokens) < 500:
            row = likeliest[tokens[-2] % 2][tokens[-1]]
            tokens.append(rng.choices(row[:3], (0.7, 0.2, 0.1))[0])
        gained = []
        for drafter in (Ngrams(40, "toy"), SuffixAutomaton(), TokenRecycling(40), PromptLookup()):
            context, passes = Context(tokens[:2], 40), 0
            drafter.begin(context)
            while len(context.tokens) < len(tokens):
                tree = drafter.propose(TreeBudget(16))
                came = tokens[len(context.tokens) :]
                path = tree.along(came)
                rows = [likeliest[context.tokens[-2] % 2][context.tokens[-1]]]
                for token, parent in zip(tree.tokens, tree.parents, strict=True):
                    rows.append(likeliest[(context.tokens[-1] if parent < 0 else tree.tokens[parent]) % 2][token])
                emitted = tuple(came[: len(path) + 1])
                context.tokens.extend(emitted)
                drafter.observe(Feedback(tree, path, emitted, torch.tensor(rows)))
                passes += 1
            gained.append(len(tokens) / passes)
        assert gained[0] > max(gained[1:]) > 1.5
