"""Sizes, fractions and options: what is read, what is refused, and that every refusal says what would do."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig, read_options
from tiercache.config.sizes import Budget, human
from tiercache.errors import UsageError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
TOTAL, FREE = 24 << 30, 23 << 30


def resolved(value: object) -> int:
    return Budget.parse(value).resolve(total_bytes=TOTAL, free_bytes=FREE)


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        ("22GiB", 22 << 30),
        ("48GB", 48 * 10**9),
        ("48 gb", 48 * 10**9),
        ("  1.5 KiB ", 1536),
        (".5MiB", 1 << 19),
        ("7.b", 7),
        ("4096", 4096),
        (4096, 4096),
        ("50%", TOTAL // 2),
        ("100%", TOTAL),
        ("0.5", TOTAL // 2),
        (0.25, TOTAL // 4),
        (1.0, TOTAL),
        ("auto", int(0.9 * FREE)),
        (" AUTO ", int(0.9 * FREE)),
    ],
)
def test_what_can_be_meant(value: object, size_bytes: int) -> None:
    assert resolved(value) == size_bytes


@given(st.integers(1, 2**53 // 10**12), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_whole_numbers_of_any_unit_are_exact(number: int, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit}"
    assert Budget.parse(text.lower() if lower else text) == Budget(size_bytes=number * UNITS[unit])


def test_large_counts_are_exact() -> None:
    assert Budget.parse(f"{2**53 + 1}") == Budget(size_bytes=2**53 + 1)


@given(st.integers(1000, 10**18))
def test_counts_of_bytes_stay(number: int) -> None:
    assert Budget.parse(number) == Budget(size_bytes=number)


@given(st.floats(0, 1, exclude_min=True))
def test_fractions_stay(fraction: float) -> None:
    assert Budget.parse(fraction) == Budget(fraction=fraction)
    assert 0 <= resolved(fraction) <= TOTAL


BAD = [
    "",
    "GiB",
    "12XB",
    "12 Gi B",
    "-1GiB",
    "1e9",
    "1,5GiB",
    "nan",
    "inf",
    "0",
    "0GiB",
    "0%",
    "101%",
    "1.5",
    "0.2B",
    "48",
]


@pytest.mark.parametrize(
    "value", [*BAD, 0, -1, 48, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None, [1], b"1GiB"]
)
def test_what_cannot_be_meant_is_refused_and_shown(value: object) -> None:
    with pytest.raises(UsageError) as refused:
        Budget.parse(value)
    shown = repr(value) if not isinstance(value, int) or value is True else str(value)
    assert shown in str(refused.value)
    assert "'" in str(refused.value)  # an example of what would do, or the units


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[0-9.]{1,6} ?[kKmMgGtTiIbB%]{0,3}", fullmatch=True)))
@example("٣GiB")  # digits of another script are digits
@example("1KB")  # the Kelvin sign, a letter that folds to k
def test_any_text_is_a_budget_or_refused(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except UsageError:
        return
    assert resolved(text) == budget.resolve(total_bytes=TOTAL, free_bytes=FREE) >= 0


def test_absurd_sizes_are_refused_or_huge() -> None:
    with contextlib.suppress(UsageError):
        assert Budget.parse("9" * 400 + "GiB").size_bytes > 10**400


def config(**options: Any) -> OffloadConfig:
    return OffloadConfig(**{"hbm": None, "dram": Budget.parse("1GiB"), **options})


def test_defaults() -> None:
    made = config()
    assert (made.precision, made.context, made.logits, made.device) == ("source", 4096, 512, "auto")
    assert (made.store, made.checks) == (None, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.context = 1


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:17"])
@pytest.mark.parametrize("precision", ["source", "int8", "int4", "int3"])
def test_good_options(device: str, precision: str) -> None:
    made = config(device=device, precision=precision, context=1, logits=1, store=Path("a b"), checks=True)
    assert (made.device, made.precision) == (device, precision)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int5"}, "'int5'; choose one of source, int8, int4, int3"),
        ({"precision": None}, "None"),
        ({"context": 0}, "context=0"),
        ({"context": 1.5}, "context=1.5"),
        ({"context": True}, "context=True"),
        ({"logits": -3}, "logits=-3"),
        ({"logits": "8"}, "logits='8'"),
        ({"device": "gpu"}, "'gpu'; choose 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:"}, "'cuda:'"),
        ({"device": "cuda:1 "}, "'cuda:1 '"),
        ({"device": ""}, "''"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        config(**options)
    assert named in str(refused.value)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="contxt"):
        config(contxt=5)


def test_a_device_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError):
        config(device=0)


def test_no_drafter_is_no_drafting() -> None:
    assert config().draft is None
    for options in ({}, {"drafter": None}, {"drafter": None, "lossless": True}):
        assert "draft" not in read_options(options)


def test_options_of_drafting() -> None:
    options = {"drafter": "auto", "draft_nodes": 7, "draft_depth": 3, "draft_width": 2, "draft_fixed": True}
    made = read_options({**options, "learned": "tables"})["draft"]
    assert made == DraftConfig(drafter="auto", nodes=7, depth=3, width=2, fixed=True, learned="tables")
    assert (made.grower, made.verify, made.lossless) == ("best-first", "walk", True)
    defaults = read_options({"drafter": "ngram"})["draft"]
    assert (defaults.nodes, defaults.depth, defaults.width, defaults.fixed, defaults.learned) == (
        64,
        16,
        4,
        False,
        None,
    )


@pytest.mark.parametrize(("nodes", "depth", "width", "slots"), [(1, 1, 1, 2), (512, 16, 8, 513), (2, 16, 8, 33)])
def test_slots_hold_the_largest_tree_and_what_was_tried_for_it(nodes: int, depth: int, width: int, slots: int) -> None:
    assert DraftConfig(drafter="auto", nodes=nodes, depth=depth, width=width).slots == slots


@pytest.mark.parametrize("value", [0, -1, True, False, 2.5, "7", None])
@pytest.mark.parametrize("name", ["draft_nodes", "draft_depth", "draft_width"])
def test_sizes_of_trees_are_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(UsageError) as refused:
        read_options({"drafter": "ngram", name: value})
    assert f"{name}={value!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"drafter": "ngram", "draft_node": 7}, "'draft_node'"),
        ({"grower": "rsd-c"}, "grower= does nothing without a drafter"),
        ({"drafter": None, "draft_fixed": True}, "draft_fixed= does nothing"),
        ({"drafter": "resident", "grower": "greedy"}, "'greedy'; choose one of best-first, fixed-width, rsd-c"),
        ({"drafter": "resident", "grower": None}, "None"),
        ({"drafter": "resident", "verify": "speculative"}, "'speculative'; choose one of walk, rejection, typical"),
        ({"drafter": "resident", "verify": "rejection"}, "'best-first' does not; choose 'rsd-c' or 'rsd-s'"),
        ({"drafter": "resident", "verify": "rejection", "grower": "sequoia"}, "'sequoia' does not"),
        ({"drafter": "ngram", "verify": "rejection", "grower": "rsd-c"}, "choose 'resident' or a small model"),
        ({"drafter": "auto", "verify": "rejection", "grower": "rsd-s"}, "choose 'resident' or a small model"),
        ({"drafter": "resident", "verify": "typical"}, "lossless=False"),
        ({"drafter": "resident", "speckv": 128}, "speckv=128; say lossless=False"),
        ({"drafter": "resident", "speckv": 63, "lossless": False}, "64 or more"),
        ({"drafter": "resident", "speckv": True, "lossless": False}, "64 or more"),
        ({"drafter": "resident", "shift": 0.5, "lossless": False}, "verify='rejection' and grower='rsd-s' too"),
        ({"drafter": "resident", "shift": 0.5, "verify": "rejection", "grower": "rsd-s"}, "shift=0.5; say lossless"),
        ({"drafter": "resident", "shift": -1}, "0 or more"),
        ({"drafter": "resident", "shift": float("nan")}, "0 or more"),
        ({"drafter": "resident", "shift": "much"}, "0 or more"),
        ({"drafter": "resident", "learned": "tables"}, "choose drafter='auto' or 'ngram'"),
        ({"drafter": Path("small"), "learned": "tables"}, "choose drafter='auto' or 'ngram'"),
        ({"drafter": "ngram", "learned": 3}, "learned=3"),
        ({"drafter": "ngram", "draft_fixed": 1}, "draft_fixed=1"),
        ({"drafter": "ngram", "lossless": None}, "lossless=None"),
    ],
)
def test_bad_options_of_drafting_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_options(options)
    assert named in str(refused.value)


def test_rules_that_go_with_a_drafter() -> None:
    for grower in ("rsd-c", "rsd-s"):
        assert DraftConfig(drafter="resident", grower=grower, verify="rejection").verify == "rejection"
    assert not DraftConfig(drafter="ngram", verify="typical", lossless=False).lossless


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (22 << 30, "22.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_human(size_bytes: int, text: str) -> None:
    assert human(size_bytes) == text


@given(st.integers(1, 1 << 50))
def test_human_reads_back_within_its_rounding(size_bytes: int) -> None:
    back = Budget.parse(human(size_bytes)).size_bytes
    assert back is not None
    assert abs(back - size_bytes) <= size_bytes * 0.0501
