"""What plans, statistics, hardware and predictions show of themselves: whole, escaped, and without colours."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from policies.plan import Plan, PlanInputs, fill_tiers
from policies.run_plan import Decision, RunPlan
from policies.settings import DEFAULT
from policies.tables import Shown, Table
from profiler.cost_model import PassTime, Prediction
from profiler.hardware import catalogue
from tiercache.config.sizes import human
from tiercache.stats.drafting import DraftStats
from tiercache.stats.neurons import NeuronStats
from tiercache.stats.run import Stats, TierStats

MIB = 1 << 20


class Cells(HTMLParser):
    """The cells of each row of HTML tables; refuses tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def plan() -> Plan:
    sizes = {0: 2 * MIB, 1: 3 * MIB, 2: MIB}
    compute, dram = {"KV cache": MIB}, {"staging": MIB}
    inputs = PlanInputs(sizes, ("first", "second", "third"), (0, 1, 2), frozenset(), None, compute, dram)
    return fill_tiers(inputs, hbm_bytes=6 * MIB, dram_bytes=9 * MIB)


def run_plan() -> RunPlan:
    decision = Decision("precision", "int4", "int8", 1.15, "<b>fewer</b> bytes")
    predicted = {"tokens_per_s": 1.5, "low": 1.0, "high": 2.0, "binding_tier": "link", "basis": "spec"}
    return RunPlan({}, {}, {}, DEFAULT, plan().to_dict(), (decision,), predicted)


def prediction() -> Prediction:
    busy = {"compute": 0.1, "cpu": 0.0, "link": 0.3, "dram": 0.2, "ssd": 0.0}
    return Prediction(2.5, 2.0, 3.0, 3.3, PassTime(busy, 0.05, 0.4, 0.3), "spec")


def stats() -> Stats:
    tiers = {"dram": TierStats(capacity_bytes=8 * MIB), "hbm": TierStats(hit_bytes=3 * MIB)}
    tiers["hbm"].stall_s["link"] = 0.25
    made = Stats("int8", "cpu", True, tiers, decode_tokens=4, decode_s=2.0, actual_pass_s=0.5, predicted_pass_s=0.4)
    made.neurons, made.drafting = NeuronStats(tokens=2, read_bytes=4 * MIB), DraftStats(("ngram",))
    made.drafting.arm_rounds, made.drafting.arm_tokens = [0], [0]
    made.drafting.add(0, [1, 1, 2], [1, 2], 3)
    return made


@pytest.mark.parametrize(
    ("make", "cells"),
    [
        (plan, ["budget", "6.0 MiB", "9.0 MiB"]),
        (run_plan, ["precision", "int4", "int8", "+115%", "<b>fewer</b> bytes"]),
        (lambda: catalogue().machine("3090", dram_bytes=64 << 30), ["link_gbps", "25", "", "spec"]),
        (prediction, ["2.50", "2.00 to 3.00", "3.30", "spec"]),
        (lambda: prediction().pass_time, ["link", "300.0"]),
        (stats, ["waited for link", "", "0.250 s"]),
        (lambda: stats().tiers["hbm"], ["found here", "3.0 MiB"]),
        (lambda: stats().neurons, ["read a token", "2.0 MiB"]),
        (lambda: stats().drafting, ["tokens a pass", "3.00"]),
    ],
)
def test_each_shows_its_numbers(make: Callable[[], Shown], cells: list[str]) -> None:
    shown = make()
    html = shown._repr_html_()
    assert any(row[: len(cells)] == cells for row in Cells(html).rows)
    assert all(cell in str(shown) for cell in cells)
    assert shown._repr_mimebundle_() == {"text/plain": str(shown)}
    colours = re.findall(r"#[0-9a-f]{3,6}\b|rgba?\([^)]*\)|(?:color|background)\s*:\s*\w+", html)
    assert set(colours) == {"rgba(128, 128, 128, 0.4)"}  # a grey that is seen on white and on black


def test_parts_of_a_whole_add_up() -> None:
    (table,) = plan().tables()
    rows = {name: cells for name, *cells in table.rows}
    counted = [int(rows["units that stay"][0]), int(rows["units that pass through"][0])]
    assert sum(counted) == 3
    assert set(rows) >= {"KV cache", "staging", "free", "weights that stay"}


def test_a_table_as_text_and_as_html() -> None:
    table = Table("A & B", ("what", "n"), (("<script>", "7"), ("longer words", "12")))
    assert table.text.splitlines() == ["A & B", "what           n", "<script>       7", "longer words  12"]
    assert "<script>" not in table.html
    assert Cells(table.html).rows == [["what", "n"], ["<script>", "7"], ["longer words", "12"]]
    assert "A &amp; B" in table.html
    assert Cells(Table("empty", ("what",), ()).html).rows == [["what"]]


def test_sizes_for_people() -> None:
    assert [human(size) for size in (0, 1536, 3 * MIB, 5 << 40)] == ["0 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]
