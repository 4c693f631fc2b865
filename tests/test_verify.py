"""What is emitted is what the target alone would emit: token for token where noise is shared, else in distribution."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiercache.decode import verify
from tiercache.decode.verify import Rejection, Rule, Scores, ShiftedRejection, TargetWalk, Typical, Walk
from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.grow import grower
from tiercache.draft.growing_tree import Grower, GrowingTree, TokenCandidates
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.sampled_growers import Branching, StochasticBeam
from tiercache.draft.tree import ROOT, DraftTree, chain
from tiercache.errors import DraftError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH, PROMPT = 5, 3, (9,)
OUTCOMES = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
DRAWING: dict[str, dict] = {"rsd-c": {"branching": (3, 2)}, "rsd-s": {}}
Path = tuple[int, ...]


def grower_of(name: str, **options: Any) -> Grower:
    """The grower of a name; those that draw take options."""
    return {"rsd-c": Branching, "rsd-s": StochasticBeam}[name](**options) if name in DRAWING else grower(name)


@cache
def scores_after(path: Path, score_scale: float = 1.5, seed: int = 1) -> Tensor:
    """The target's scores after a path; one token in some places is banned."""
    chance = torch.Generator().manual_seed(hash((seed, path)) % (1 << 31))
    scores = score_scale * torch.randn(VOCABULARY, generator=chance)
    if len(path) == 1:
        scores[path[0]] = -torch.inf
    return scores


@cache
def logq_after(path: Path) -> Tensor:
    """A drafter that is neither close nor lost, and never guesses one token."""
    chance = torch.Generator().manual_seed(hash((2, path)) % (1 << 31))
    logits = 0.6 * scores_after(path, seed=1).nan_to_num(neginf=0.0) + torch.randn(VOCABULARY, generator=chance)
    logits[4 if len(path) == 1 else 3] = -torch.inf
    return torch.log_softmax(logits, -1)


def probabilities(after: Callable[[Path], Tensor]) -> Tensor:
    """Of every outcome, by a target whose scores are `after`."""
    p = [
        torch.stack([torch.softmax(after(outcome[:n]).double(), -1)[outcome[n]] for n in range(LENGTH)]).prod()
        for outcome in OUTCOMES
    ]
    return torch.stack(p)


def p_of_chi_square(counts: Tensor, p: Tensor) -> float:
    """That counts so far from `p` come about by chance; cells of which fewer than 5 are expected are pooled."""
    assert not counts[p == 0].any()
    expected = counts.sum() * p
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() >= 5:
        cells.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    statistic = sum(((seen - hoped) ** 2 / hoped).sum() for seen, hoped in cells)
    freedom = sum(len(seen) for seen, _ in cells) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


def path_in(tree: GrowingTree | DraftTree, node: int) -> Path:
    tokens: list[int] = []
    while node != ROOT:
        tokens.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(tokens))


@dataclass
class Decoder:
    """A decode loop in the small: passes until `LENGTH` tokens are there."""

    rule: Rule
    grow: Grower
    budget: TreeBudget = field(default_factory=lambda: TreeBudget(5, 2, 3))
    after: Callable[[Path], Tensor] = scores_after
    noise: GumbelNoise | None = None
    spoil: Callable[[DraftTree, Path], DraftTree] | None = None
    length: int = LENGTH
    accepted: int = 0

    def run(self) -> Path:
        done: list[int] = []
        while len(done) < self.length:
            context = Context([*PROMPT, *done], VOCABULARY, noise=self.noise)

            def scorer(sketch: GrowingTree, nodes: Sequence[int], done: Path = tuple(done)) -> TokenCandidates:
                rows = [logq_after(done + path_in(sketch, node)) for node in nodes]
                return TokenCandidates(rows[0][None] if len(rows) == 1 else torch.stack(rows))

            tree = self.grow(scorer, context, self.budget)
            tree = tree if self.spoil is None else self.spoil(tree, tuple(done))
            done += self.walk(tree, tuple(done))
        return tuple(done[: self.length])

    def walk(self, tree: DraftTree, done: Path) -> list[int]:
        """One pass: checks that scores are asked for lazily, once for each node, down the path."""
        asked: list[int] = []

        def scores(node: int) -> Tensor:
            asked.append(node)
            return self.after(done + path_in(tree, node))

        emitted: list[int] = []
        at = ROOT
        for token, node in self.rule.walk(tree, scores, len(PROMPT) + len(done)):
            emitted.append(token)
            assert asked[-1] == at
            assert len(asked) == len(emitted)
            if node is None:
                break
            assert (tree.tokens[node], tree.parents[node]) == (token, at)
            at = node
            self.accepted += 1
        assert node is None
        return emitted

    def counts(self, runs: int) -> Tensor:
        """How often each outcome came about."""
        places = torch.tensor([self.run() for _ in range(runs)]) @ torch.tensor([25, 5, 1])
        return torch.bincount(places, minlength=len(OUTCOMES)).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_chi_square_is_right() -> None:
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert p_of_chi_square(torch.tensor([25.0, 25, 25, 25]).double(), uniform) == 1
    seen = p_of_chi_square(torch.tensor([30.0, 20, 20, 30]).double(), uniform)
    assert seen == pytest.approx(0.261464, abs=1e-6)  # 4.0 with 3 degrees of freedom, from a table
    rare = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)  # three cells become one
    assert p_of_chi_square(torch.tensor([195.0, 5, 0, 0]).double(), rare) == pytest.approx(0.678, abs=1e-3)


@pytest.mark.parametrize("name", DRAWING)
def test_rejection_leaves_the_targets_distribution(name: str) -> None:
    decoder = Decoder(Rejection(generator(1)), grower_of(name, seed=1, **DRAWING[name]))
    counts, p = decoder.counts(2000), probabilities(scores_after)
    assert p_of_chi_square(counts, p) > 1e-4
    assert p_of_chi_square(counts.view(5, 25).sum(1), p.view(5, 25).sum(1)) > 1e-4  # sees less, but sharper
    assert decoder.accepted > 2000


def test_a_shifted_target_is_what_is_emitted() -> None:
    def shifted(path: Path) -> Tensor:
        p, q = torch.softmax(scores_after(path), -1), logq_after(path).exp()
        return scores_after(path) + 4.0 * (q - p) * (q >= 0.3 * q.max())

    decoder = Decoder(ShiftedRejection(generator(2), 4.0, cut=0.3), grower_of("rsd-c", seed=2), length=1)
    decoder.budget = TreeBudget(3, 1, 3)
    counts = torch.bincount(torch.tensor([decoder.run()[0] for _ in range(1500)]), minlength=VOCABULARY)
    assert p_of_chi_square(counts.double(), torch.softmax(shifted(()).double(), -1)) > 1e-4
    assert p_of_chi_square(counts.double(), torch.softmax(scores_after(()).double(), -1)) < 1e-4
    rules = (Rejection(generator(4)), ShiftedRejection(generator(4), 0.0))
    one, other = (Decoder(rule, grower_of("rsd-c", seed=3)) for rule in rules)
    assert [one.run() for _ in range(20)] == [other.run() for _ in range(20)]


class NoRenormalisation(Rejection):
    """Wrong: tries the next child by what is left of p, not by its share."""

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        p, q = torch.softmax(scores, -1), tree.q[node].clone() if node in tree.q else None
        for child in tree.children.get(node, ()):
            token = tree.tokens[child]
            if torch.rand((), generator=self._generator) * q[token] < p[token]:
                return token, child
            p = (p - q).clamp(min=0)
            q[token] = 0
            q /= q.sum()
        return int(torch.multinomial(p, 1, generator=self._generator)), None


def likeliest_first(tree: DraftTree, done: Path) -> DraftTree:
    """Wrong: siblings in the order of q."""
    order, place = [], {ROOT: ROOT}
    level = [ROOT]
    while level:
        below = []
        for parent in level:
            below += sorted(tree.children.get(parent, ()), key=lambda child: -tree.q[parent][tree.tokens[child]])
        place |= {node: len(order) + n for n, node in enumerate(below)}
        order += below
        level = below
    return DraftTree(
        tuple(tree.tokens[node] for node in order),
        tuple(place[tree.parents[node]] for node in order),
        tree.order,
        {place[parent]: row for parent, row in tree.q.items()},
    )


def as_if_drawn(tree: DraftTree, done: Path) -> DraftTree:
    """Wrong: the best tokens, said to have been drawn from the softmax."""
    q = {parent: logq_after(done + path_in(tree, parent)).exp() for parent in tree.children}
    return replace(tree, order="without_replacement", q=q)


class SameChance(Rejection):
    """Wrong: accepts by the very numbers by which the tree was drawn."""

    def __init__(self, draws: torch.Generator) -> None:
        super().__init__(torch.Generator())
        self._draws, self._before = draws, draws.get_state()

    def walk(self, tree: DraftTree, scores: Scores, position: int) -> Walk:
        self._generator.set_state(self._before)
        self._before = self._draws.get_state()
        return super().walk(tree, scores, position)


def no_renormalisation(draw: Branching) -> Decoder:
    return Decoder(NoRenormalisation(generator(6)), draw)


def resorted(draw: Branching) -> Decoder:
    return Decoder(Rejection(generator(7)), draw, spoil=likeliest_first)


def greedy_drafts(draw: Branching) -> Decoder:
    return Decoder(Rejection(generator(8)), grower("best-first"), spoil=as_if_drawn)


def same_chance(draw: Branching) -> Decoder:
    return Decoder(SameChance(draw.draws._generator), draw)


@pytest.mark.parametrize(
    ("wrong", "runs"), [(no_renormalisation, 900), (resorted, 300), (greedy_drafts, 300), (same_chance, 1800)]
)
def test_a_wrong_rule_is_found_out(wrong: Callable[[Branching], Decoder], runs: int) -> None:
    decoder = wrong(grower_of("rsd-c", seed=5, branching=(3, 2)))
    assert p_of_chi_square(decoder.counts(runs), probabilities(scores_after)) < 1e-4


def plain(after: Callable[[Path], Tensor], noise: GumbelNoise | None) -> Path:
    """Decoding without a drafter."""
    done: Path = ()
    while len(done) < LENGTH:
        scores = after(done) if noise is None else after(done) + noise(len(PROMPT) + len(done))
        done += (int(scores.argmax()),)
    return done


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["best-first", "fixed-width", "sequoia", "rsd-c", "rsd-s"])
def test_the_walk_emits_what_plain_decoding_emits(name: str, sampled: bool) -> None:
    grow = grower(name)
    for seed in range(40 if sampled else 3):
        noise = GumbelNoise(seed, VOCABULARY) if sampled else None
        assert Decoder(TargetWalk(noise), grow, noise=noise).run() == plain(scores_after, noise)


def test_the_walk_samples_from_the_target_and_shared_noise_is_accepted_more() -> None:
    counts, accepted = torch.zeros(len(OUTCOMES)).double(), {True: 0, False: 0}
    for sample in range(1000):
        noise = GumbelNoise(sample, VOCABULARY)
        decoder = Decoder(TargetWalk(noise), grower("best-first"), noise=noise)
        counts += decoder.counts(1)
        accepted[True] += decoder.accepted
        if sample < 200:
            untold = Decoder(TargetWalk(noise), grower("best-first"))
            untold.run()
            accepted[False] += 5 * untold.accepted
    assert p_of_chi_square(counts, probabilities(scores_after)) > 1e-4
    assert accepted[True] > 1.1 * accepted[False]


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Any at all: duplicates, tokens that are banned or outside the vocabulary, long chains."""
    nodes = draw(st.integers(0, 12))
    tokens = draw(st.lists(st.integers(-1, VOCABULARY + 1), min_size=nodes, max_size=nodes))
    parents = tuple(draw(st.sampled_from([*range(max(-1, node - 4), node)])) for node in range(nodes))
    order = draw(st.sampled_from(["deterministic", "shared_gumbel"]))
    return DraftTree(tuple(tokens), parents, order)


@given(trees(), st.integers(0, 3), st.booleans())
def test_no_tree_changes_what_the_walk_emits(tree: DraftTree, seed: int, sampled: bool) -> None:
    noise = GumbelNoise(seed, VOCABULARY) if sampled else None
    whole = [int((scores_after(()) if noise is None else scores_after(()) + noise(1)).argmax())]
    emitted = Decoder(TargetWalk(noise), grower("best-first")).walk(tree, ())
    while len(whole) < len(emitted):
        scores = scores_after(tuple(whole))
        whole.append(int((scores if noise is None else scores + noise(1 + len(whole))).argmax()))
    assert emitted == whole


def test_a_tree_that_is_always_right_is_accepted_whole_and_the_caller_may_stop() -> None:
    noise = GumbelNoise(1, VOCABULARY)
    right: Path = ()
    while len(right) < 6:
        right += (int((scores_after(right) + noise(1 + len(right))).argmax()),)
    for order in ("deterministic", "shared_gumbel"):
        tree = replace(chain(right[:5]), order=order)
        assert Decoder(TargetWalk(noise), grower("best-first")).walk(tree, ()) == list(right)
    asked: list[int] = []

    def scores(node: int) -> Tensor:
        asked.append(node)
        return scores_after(path_in(tree, node))

    walk = TargetWalk(noise).walk(tree, scores, 1)
    assert [next(walk), next(walk)] == [(right[0], 0), (right[1], 1)]
    assert asked == [ROOT, 0]  # a processor never sees a token behind the end


@pytest.mark.parametrize("rule", [Rejection(None), Typical(None), ShiftedRejection(None, 0.0)], ids=lambda r: r.name)
def test_without_chance_a_rule_is_greedy_decoding(rule: Rule) -> None:
    for seed in range(10):
        assert Decoder(rule, grower_of("rsd-c", seed=seed, branching=(3, 2))).run() == plain(scores_after, None)


def drawn(tokens: Path, *q: float) -> DraftTree:
    return DraftTree(tokens, (ROOT,) * len(tokens), "without_replacement", {ROOT: torch.tensor(q)})


def first(rule: Rule, tree: DraftTree, *p: float) -> tuple[int, int | None]:
    return next(rule.walk(tree, lambda node: torch.tensor(p).log(), 0))


def test_rejection_at_the_edges() -> None:
    for seed in range(30):
        rule = Rejection(generator(seed))
        assert first(rule, drawn((0, 1), 0.5, 0.5), 0.5, 0.5) == (0, 0)
        assert first(rule, drawn((0, 1), 1 - 1e-7, 1e-7), 0.0, 1.0) == (1, 1)
        assert first(rule, drawn((0,), 1.0, 0.0, 0.0), 0.0, 0.0, 1.0) == (2, None)
        assert first(rule, drawn((2, 1), 0.0, 0.5, 0.5), 1.0, 0.0, 0.0) == (0, None)  # q has no more to give
        assert first(rule, DraftTree(), 0.0, 1.0) == (1, None)  # of another order, but empty
        assert first(rule, drawn((0,), 0.6, 0.4), 1.0, 0.0) == (0, 0)


def test_what_leaves_nothing_of_p_is_never_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_uniform", lambda generator: 1.0)  # as if rounding had met the highest number
    assert first(Rejection(generator(0)), drawn((0, 1), 0.5, 0.5), 0.5, 0.5) == (0, 0)
    assert first(Rejection(generator(0)), DraftTree(), 0.5, 0.5, 0.0) == (0, None)  # never the token without any


def test_typical_acceptance_takes_what_is_good_enough() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tree = DraftTree((3, 1, 2), (ROOT,) * 3)
    assert first(Typical(generator(0), 0.2, 1.0), tree, *p) == (1, 1)  # the likeliest above 0.2
    exp_entropy = float((-(p * p.log()).sum()).exp())
    for delta, good in ((0.29, True), (0.31, False)):
        taken = [first(Typical(generator(n), 1.0, delta * exp_entropy), tree, *p)[1] for n in range(20)]
        assert taken == [1 if good else None] * 20
    own = [first(Typical(generator(n), 1.0, 1.0), tree, *p)[0] for n in range(300)]
    assert 110 < own.count(0) < 190  # the target draws


def test_trees_that_do_not_fit_are_refused() -> None:
    tree = chain((1, 2))
    with pytest.raises(DraftError, match=r"'rejection' takes trees of order without_replacement, not 'deterministic'"):
        Rejection(None).walk(tree, scores_after, 0)
    with pytest.raises(DraftError, match="'shifted rejection' takes trees of order without_replacement"):
        ShiftedRejection(None, 1.0).walk(tree, scores_after, 0)
    with pytest.raises(DraftError, match=r"node 0 has token 1, to which q gives 0.0; q must be what it was drawn from"):
        first(Rejection(generator(0)), drawn((1,), 1.0, 0.0), 0.5, 0.5)


@pytest.mark.parametrize("rule", [TargetWalk(None), TargetWalk(lambda _: torch.zeros(3)), Rejection(generator(0))])
def test_scores_without_a_token_are_refused(rule: Rule) -> None:
    for scores in ([-torch.inf] * 3, [1.0, torch.nan, 0.0]):
        match = "ban all 3 tokens after the root" if scores[0] < 0 else "1 of 3 scores of the target after the root"
        with pytest.raises(UsageError, match=match):
            next(rule.walk(DraftTree(), lambda _, scores=scores: torch.tensor(scores), 0))
