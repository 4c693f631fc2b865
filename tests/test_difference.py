"""The difference of two statistics, by which answers are told of at the terminal and by the server."""

from tiercache.stats.difference import behind_first, difference, moved_bytes, tokens_per_s
from tiercache.stats.drafting import DraftStats
from tiercache.stats.neurons import NeuronStats
from tiercache.stats.run import Stats, TierStats


def test_what_came_between() -> None:
    stats = Stats("int8", "cpu", True, {"hbm": TierStats(), "dram": TierStats()})
    stats.neurons, stats.drafting = NeuronStats(), DraftStats(("lookup",))
    stats.drafting.arm_rounds, stats.drafting.arm_tokens = [0], [0]
    stats.ssd_bytes, stats.tiers["dram"].hit_bytes = 5, 7  # before
    before = stats.to_dict()
    assert difference(before, stats.to_dict())["drafting"]["tokens_per_pass"] is None
    stats.ssd_bytes += 100
    stats.tiers["hbm"].loaded_bytes += 20
    stats.tiers["dram"].hit_bytes += 30
    stats.tiers["dram"].miss_bytes += 4
    stats.neurons.moved_bytes += 2
    stats.neurons.dense_bytes += 1
    stats.neurons.read_bytes += 9
    for emitted in (3, 1):
        stats.drafting.add(0, [1, 2], [1, 2][: emitted - 1], emitted)
    found = difference(before, stats.to_dict())
    assert moved_bytes(found) == {"ssd": 100, "link": 23, "neurons": 9}
    assert moved_bytes({**found, "neurons": None}) == {"ssd": 100, "link": 20, "dram": 34}
    assert found["drafting"]["tokens_per_pass"] == stats.drafting.tokens_per_pass == 2
    assert found["tiers"]["dram"]["hit_bytes"] == 30


def test_speed_counts_what_is_behind_the_first_token() -> None:
    answers = [(5, 1.0, 3.0), (1, 0.5, 0.6), (0, None, 0.1), (3, 0.5, 2.5)]
    assert behind_first(answers) == (6, 4.0)
    assert tokens_per_s(6, 4.0) == 1.5
    assert tokens_per_s(*behind_first(answers[1:3])) is None


def test_the_speed_of_a_run_is_that_of_its_drafted_rounds() -> None:
    stats = Stats("int8", "cpu", True, {}, decode_tokens=2, decode_s=1.0, drafting=DraftStats(("lookup",)))
    assert stats.tokens_per_s == 2
    assert stats.drafting is not None
    stats.drafting.rounds, stats.drafting.tokens, stats.drafting.draft_s, stats.drafting.verify_s = 4, 12, 1.0, 2.0
    assert stats.to_dict()["tokens_per_s"] == 4
