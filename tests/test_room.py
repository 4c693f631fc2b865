"""Whether drafting pays for its room: what was measured, and what has to hold of any two placements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.room import TOKENS, pays, price


@pytest.mark.parametrize(
    ("plain_s", "drafting_s", "waits_s", "worth"),
    [
        (0.167, 0.279, 0.275, False),  # 65 and 110 MB over 0.4 GB/s; measured: 0.84 to 0.91 of plain decoding's speed
        (0.264, 0.287, 0.283, True),  # 104 and 113 MB
        (0.004, 0.05, 0.05, False),  # nothing waited before
        (0.1, 0.1, 0.0, True),  # the room is free
        (0.1, 0.101, 0.0, False),  # nothing waits, so nothing is shared
    ],
)
def test_where_drafting_pays_for_its_room(plain_s: float, drafting_s: float, waits_s: float, worth: bool) -> None:
    assert pays(plain_s, drafting_s, waits_s) == worth


seconds = st.floats(1e-4, 100)


@given(seconds, seconds, st.floats(0, 1), st.floats(0, 1))
def test_longer_passes_never_pay_sooner(plain_s: float, more_s: float, share: float, further: float) -> None:
    drafting_s = plain_s + more_s
    waits_s = share * drafting_s
    assert pays(plain_s, plain_s, share * plain_s)
    assert price(plain_s, drafting_s) >= 1
    longer_s = drafting_s + further
    assert pays(plain_s, drafting_s, waits_s) or not pays(plain_s, longer_s, waits_s)
    assert not pays(plain_s, drafting_s, waits_s) or price(plain_s, drafting_s) < TOKENS + 1e-9
