"""Whether drafting pays for its room: what was measured, and what has to hold of any two placements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.room import TOKENS, Rates, Traffic, pays, price

MB = 10**6
REGION, LINK, CARD = Rates(35e9, 35e9, 3e9), Rates(35e9, 0.4e9, 3e9), Rates(900e9, 25e9, 3e9)


def traffic(up: float = 0, ssd: float = 0, needed: float = 143) -> Traffic:
    return Traffic(int(needed * MB), int(up * MB), int(ssd * MB))


@pytest.mark.parametrize(
    ("plain", "drafting", "rates", "worth"),
    [
        (traffic(65), traffic(110), LINK, False),  # measured: 0.84 to 0.91 of plain decoding's speed
        (traffic(104), traffic(113), LINK, True),
        (traffic(104), traffic(113), REGION, False),  # nothing waits there: a copy is as fast as a product
        (traffic(0), traffic(20), LINK, False),
        (traffic(), traffic(), REGION, True),  # the room is free
        (traffic(ssd=60), traffic(ssd=72), REGION, True),
        (traffic(19_000, needed=39_000), traffic(19_500, needed=39_000), CARD, True),  # a 70B on 24 GB
    ],
)
def test_where_drafting_pays_for_its_room(plain: Traffic, drafting: Traffic, rates: Rates, worth: bool) -> None:
    assert pays(plain, drafting, rates) == worth


bytes_ = st.integers(0, 1 << 36)


@given(bytes_, bytes_, st.integers(1, 1 << 36), st.sampled_from((REGION, LINK, CARD)))
def test_more_bytes_never_pay_sooner(up: int, more: int, needed: int, rates: Rates) -> None:
    plain, drafting = Traffic(needed, up, 0), Traffic(needed, up + more, 0)
    cost = price(plain, drafting, rates)
    assert cost >= 1
    assert pays(plain, plain, rates)
    assert pays(plain, drafting, rates) or not pays(plain, Traffic(needed, up + 2 * more, 0), rates)
    assert not pays(plain, drafting, rates) or cost < TOKENS + 1e-9
