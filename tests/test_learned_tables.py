"""Tables that are kept across runs: what they count, and that nothing ever damages them."""

import gc
import math
import os
import random
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import lmdb
import pytest

from tiercache.draft.base import Context, Feedback, TreeBudget
from tiercache.draft.ngram import counts
from tiercache.draft.ngram.counts import FILE, LEAST_BYTES, CountStore
from tiercache.draft.ngram.learned import Learned
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.tree import DraftTree
from tiercache.errors import ClosedError, EnvironmentUnsupportedError, StoreError, TiercacheError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

StartChild = Callable[..., tuple[BaseProcess, Connection]]
InChild = Callable[..., None]


def learned(folder: Path, *, batch: int = 16, vocabulary: int = 6) -> Learned:
    return Learned(folder, identity="toy", vocabulary=vocabulary, batch=batch, max_bytes=LEAST_BYTES)


def store(folder: Path) -> CountStore:
    return CountStore(folder, identity="toy", vocabulary=6, max_bytes=LEAST_BYTES)


def say(drafter: Learned, context: Context, tokens: Sequence[int]) -> None:
    context.tokens.extend(tokens)
    drafter.observe(Feedback(DraftTree(), (), tuple(tokens)))


def counted(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[tuple[int, ...], Counter[int]]:
    """What followed each n-gram, in texts of a prompt and what was emitted behind it."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for prompt, emitted in texts:
        tokens = [*prompt, *emitted]
        for place in range(len(prompt), len(tokens)):
            for size in (1, 2, 3):
                if place >= size:
                    found.setdefault(tuple(tokens[place - size : place]), Counter())[tokens[place]] += 1
    return found


def everything(folder: Path) -> dict[tuple[int, ...], dict[int, int]]:
    """All that is kept, each record checked."""
    with lmdb.open(str(folder / FILE), subdir=False, readonly=True) as env, env.begin() as transaction:
        keys = [bytes(key) for key, _ in transaction.cursor() if key[:1] == b"g"]
    kept = store(folder)
    grams = [tuple(int.from_bytes(key[at : at + 4], "little") for at in range(1, len(key), 4)) for key in keys]
    with kept.reading() as look_up:
        found = {gram: dict(look_up(gram)) for gram in grams}
    assert len(kept) == len(found)
    kept.close()
    return found


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_counts_what_was_emitted_and_no_prompt(tmp_path: Path, batch: int) -> None:
    rng, texts = random.Random(batch), []
    for _ in range(2):  # runs
        drafter = learned(tmp_path, batch=batch)
        for _ in range(4):
            prompt = [rng.randrange(6) for _ in range(rng.randrange(1, 6))]
            context = Context(list(prompt), 6)
            drafter.begin(context)
            for _ in range(rng.randrange(4)):
                say(drafter, context, [rng.randrange(6) for _ in range(rng.randrange(1, 5))])
            texts.append((prompt, context.tokens[len(prompt) :]))
        drafter.close()
        drafter.close()
    assert everything(tmp_path) == counted(texts)


def test_guesses_what_earlier_runs_said(tmp_path: Path) -> None:
    first, context = learned(tmp_path), Context([0], 6)
    first.begin(context)
    say(first, context, [1, 2, 3, 1, 2, 4, 1, 2, 3])
    assert not len(first.propose(TreeBudget(8)))  # nothing is put there yet
    first.close()
    second = learned(tmp_path)
    second.begin(Context([5, 5, 1, 2], 6))
    tree = second.propose(TreeBudget(3, depth=1))
    assert tree.tokens[:2] == (3, 4)
    # By hand: after 5 1 2 nothing, after 1 2 came 3 twice and 4 once, and 2 of 5 shares are left to what came after 2
    # alone, of which nothing is new.
    assert tree.logq == pytest.approx([-0.9162907, -1.6094379], abs=1e-6)
    deeper = second.propose(TreeBudget(8, depth=2))
    assert (deeper.tokens[1 + deeper.tokens[1:].index(1)], deeper.parents[1 + deeper.tokens[1:].index(1)]) == (1, 0)
    second.begin(Context([1, 2], 6, noise=GumbelNoise(1, 6), room=2))
    tree = second.propose(TreeBudget(64))
    assert (tree.order, max(tree.depths)) == ("shared_gumbel", 1)
    for history in ([0], [2**40, 2], [10**9]):
        second.begin(context := Context(history, 6))
        assert all(token < 6 for token in second.propose(TreeBudget(64, depth=4)).tokens)
        say(second, context, [2**40, 3])
    second.close()
    assert max(map(max, everything(tmp_path))) < 6


def test_shorter_ngrams_fill_in(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.add({(1, 2): {3: 3}, (2,): {3: 9, 4: 3, 5: 1}})
    kept.close()
    drafter = learned(tmp_path)
    drafter.begin(Context([1, 2], 6))
    tree = drafter.propose(TreeBudget(8, depth=1))
    drafter.close()
    assert tree.tokens == (3, 4, 5)
    assert [math.exp(logq) for logq in tree.logq or ()] == pytest.approx([3 / 4, 3 / 16 / 4, 1 / 16 / 4])


def test_sees_what_another_process_added(tmp_path: Path, in_child: InChild) -> None:
    drafter = learned(tmp_path, batch=4)
    drafter.begin(context := Context([0], 6))
    in_child(add_batches, tmp_path, 1)
    say(drafter, context, [5, 5, 5, 1])  # a batch of its own
    assert drafter.propose(TreeBudget(1)).tokens == (2,)
    drafter.close()


class TestRefusals:
    def test_of_others(self, tmp_path: Path) -> None:
        store(tmp_path).close()
        for other in ({"identity": "other", "vocabulary": 6}, {"identity": "toy", "vocabulary": 7}):
            with pytest.raises(StoreError, match="another folder"):
                CountStore(tmp_path, **other)  # type: ignore[arg-type]
        assert len(store(tmp_path)) == 0  # they left it alone

    @pytest.mark.parametrize("size", [0, 4096, 3 * 4096 + 5, "junk", "zeros"])
    def test_of_damaged_files(self, tmp_path: Path, size: int | str) -> None:
        kept = store(tmp_path)
        kept.add({(one, two): {1: 1} for one in range(6) for two in range(6)})
        kept.add({(one, two, 0): {1: 1} for one in range(30) for two in range(30)})
        kept.close()
        path = tmp_path / FILE
        if isinstance(size, int):
            os.truncate(path, size)
        else:
            path.write_bytes(bytes(100_000) if size == "zeros" else random.Random(1).randbytes(100_000))
        with pytest.raises(StoreError, match="remove it"):
            store(tmp_path)

    def test_of_a_damaged_record(self, tmp_path: Path) -> None:
        kept = store(tmp_path)
        kept.add({(1,): {2: 3}})
        kept.close()
        with (
            lmdb.open(str(tmp_path / FILE), subdir=False, map_size=LEAST_BYTES) as env,
            env.begin(write=True) as transaction,
        ):
            key = b"g\1\0\0\0"
            value = bytearray(transaction.get(key))
            value[-1] ^= 1
            transaction.put(key, bytes(value))
        drafter = learned(tmp_path)
        drafter.begin(context := Context([1], 6))
        with pytest.raises(StoreError, match="checksum"):
            drafter.propose(TreeBudget(4))
        say(drafter, context, [2])
        with pytest.raises(StoreError, match="checksum"):
            drafter.close()
        drafter.close()  # closed at any rate
        learned(tmp_path).close()

    def test_of_use_after_closing_and_of_a_second_opening(self, tmp_path: Path) -> None:
        drafter = learned(tmp_path, batch=1)
        with pytest.raises(UsageError, match="open already"):
            store(tmp_path)
        drafter.begin(context := Context([1], 6))
        drafter.close()
        with pytest.raises(ClosedError, match="new drafter"):
            drafter.propose(TreeBudget(4))
        with pytest.raises(ClosedError, match="new drafter"):
            say(drafter, context, [2])

    def test_of_places_and_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="bytes"):
            CountStore(tmp_path, identity="toy", vocabulary=6, max_bytes=LEAST_BYTES - 1)
        for wrong in ({"batch": 0}, {"vocabulary": 0}):
            with pytest.raises(UsageError, match="positive"):
                learned(tmp_path, **wrong)
        (tmp_path / "file").touch()
        with pytest.raises(EnvironmentUnsupportedError, match="another"):
            store(tmp_path / "file")

        def full(*_: object, **__: object) -> None:
            raise lmdb.Error("mdb_txn_commit: No space left on device")

        monkeypatch.setattr(counts.lmdb, "open", full)
        with pytest.raises(EnvironmentUnsupportedError, match="full"):
            store(tmp_path)


def test_is_its_owners_alone(tmp_path: Path) -> None:
    store(tmp_path / "deep" / "folder").close()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "deep" / "folder").iterdir())


def test_stays_within_its_bytes(tmp_path: Path) -> None:
    kept, rng = store(tmp_path), random.Random(0)
    limit = LEAST_BYTES // 640
    for turn in range(12):
        grams = {tuple(rng.randrange(1 << 20) for _ in range(3)): {rng.randrange(6): 1} for _ in range(2000)}
        kept.add({**grams, (1, 2, 3): {4: 100}})
        assert len(kept) <= limit
        assert turn < 4 or len(kept) > limit // 3  # and makes use of them
    with kept.reading() as look_up:
        assert look_up((1, 2, 3))[0][0] == 4  # what is common stays
        assert 100 <= look_up((1, 2, 3))[0][1] < 1200  # if not for ever
        assert sum(bool(look_up(gram)) for gram in grams) > 500
    kept.close()
    assert (tmp_path / FILE).stat().st_size == LEAST_BYTES


def test_a_full_record_still_learns(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.add({(1,): dict.fromkeys(range(8), 1)})
    kept.add({(1,): {9: 1}})
    with kept.reading() as look_up:
        assert (9, 1) in look_up((1,))
    kept.add({(1,): {9: 2**32}})
    with kept.reading() as look_up:
        assert look_up((1,))[0] == (9, 2**32 - 1)
        assert len(look_up((1,))) == 8
    kept.close()


def add_batches(folder: Path, batches: int, tell: Callable[[int], None] = lambda _: None) -> None:
    """The same five tokens, batch for batch."""
    drafter = learned(folder, batch=5)
    for done in range(1, batches + 1):
        drafter.begin(context := Context([0], 6))
        say(drafter, context, [1, 2, 3, 4, 5])
        tell(done)
    drafter.close()


def tell_of_batches(pipe: Connection, folder: Path, batches: int) -> None:
    """In a child."""
    add_batches(folder, batches, pipe.send)


def test_two_processes_add_at_once(tmp_path: Path, start_child: StartChild) -> None:
    children = [start_child(tell_of_batches, tmp_path, 40) for _ in range(2)]
    for process, _ in children:
        process.join(60)
        assert process.exitcode == 0
    once = counted([([0], [1, 2, 3, 4, 5])])
    assert everything(tmp_path) == {gram: dict.fromkeys(following, 80) for gram, following in once.items()}


def test_killed_at_any_moment(tmp_path: Path, start_child: StartChild) -> None:
    rng, told, kills = random.Random(2), 0, 0
    once = counted([([0], [1, 2, 3, 4, 5])])
    for _ in range(8):
        process, pipe = start_child(tell_of_batches, tmp_path, 10**6)
        enough = rng.randrange(12)
        while enough and pipe.poll(60):
            pipe.recv()
            told, enough = told + 1, enough - 1
        if not enough:
            process.join(rng.uniform(0, 0.004))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        while True:
            try:
                pipe.recv()
            except EOFError:
                break
            told += 1
        if (tmp_path / FILE).exists():
            kept = everything(tmp_path)
            times = {count for following in kept.values() for count in following.values()} or {0}
            assert len(times) == 1  # a batch is there as a whole
            assert kept.keys() == (once.keys() if told or times != {0} else set())
            assert told <= times.pop() <= told + kills  # of each that was killed, one may be there it did not tell of
        else:
            assert not told
    assert kills == 8
    assert told


def test_takes_no_more_memory_than_it_says(tmp_path: Path) -> None:
    rng = random.Random(0)
    drafter = learned(tmp_path, vocabulary=200, batch=512)
    gc.collect()
    tracemalloc.start()
    for _ in range(2):
        drafter.begin(context := Context([0], 200))
        for _ in range(12):
            drafter.propose(TreeBudget(64))
            say(drafter, context, [rng.randrange(200) for _ in range(30)])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    drafter.close()
    assert held < peak <= drafter.requirements.host_bytes + 200_000
    assert peak > drafter.requirements.host_bytes / 8


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(TiercacheError):
        store(tmp_path)
