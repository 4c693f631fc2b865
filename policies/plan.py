"""What goes where: every byte of every budget, before one is allocated.

Knows sizes; allocates nothing and measures nothing. The bytes named here are the bytes the engine allocates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from policies import pinned
from policies.settings import DEFAULT
from policies.tables import Shown, Table, human
from policies.types import Key, UnitPlacement


@dataclass(frozen=True)
class PlanInputs:
    """What a model asks of memory.

    Attributes:
        sizes: slot bytes of each unit.
        names: of the units, for messages.
        order: units in the order of one pass.
        always: units used more than once a pass, which must stay.
        table: the token embedding's unit where it is not in `order` as well (a tied head is).
        compute: bytes reserved beside the weights where they are multiplied, by purpose.
        dram: bytes reserved in main memory whatever computes, by purpose.
        only_rows: units that never go up but in rows, and so must stay in DRAM; only beside an HBM tier.
        neuron_bytes: what slots for those rows could use.
        together: units that are held at once: planes of a matrix that is cut by plane, matrices of half a layer.
        levels: of matrices that are cut by plane, the units of each plane: the fastest tier must hold the first level,
            and prefers the lower ones of the others.
    """

    sizes: Mapping[Key, int]
    names: Sequence[str]
    order: Sequence[Key]
    always: frozenset[Key]
    table: Key | None
    compute: Mapping[str, int]
    dram: Mapping[str, int]
    only_rows: tuple[Key, ...] = ()
    neuron_bytes: int = 0
    together: tuple[tuple[Key, ...], ...] = ()
    levels: tuple[frozenset[Key], ...] = ()


@dataclass(frozen=True)
class TierPlan:
    """One tier's share.

    Attributes:
        capacity_bytes: its budget.
        reserved_bytes: what is spoken for beside the units, by purpose.
        order: the units that pass through or stay, in the order of one pass.
        placement: which stay, and the ring for the others.
        table: the token embedding stays here too.
        transit_bytes: what the slab must have for the units that only pass on to HBM when the model is opened.
        neuron_bytes: for slots of single neurons' planes, beside the units.
    """

    capacity_bytes: int
    reserved_bytes: Mapping[str, int]
    order: tuple[Key, ...]
    placement: UnitPlacement
    table: bool
    transit_bytes: int = 0
    neuron_bytes: int = 0

    @property
    def slab_bytes(self) -> int:
        """What the tier allocates for units."""
        return max(self.placement.pinned_bytes + self.placement.ring_bytes, self.transit_bytes)

    @property
    def allocated_bytes(self) -> int:
        """All that it takes: units, slots of neurons, and what is reserved beside them."""
        return self.slab_bytes + self.neuron_bytes + sum(self.reserved_bytes.values())

    @property
    def passing(self) -> tuple[Key, ...]:
        """The units that do not stay."""
        staying = set(self.placement.pinned)
        return tuple(key for key in self.order if key not in staying)


@dataclass(frozen=True)
class Plan(Shown):
    """The shares of all tiers; `hbm` is None when the CPU computes straight from DRAM."""

    hbm: TierPlan | None
    dram: TierPlan

    @property
    def has_hbm(self) -> bool:
        """Whether there is an HBM tier above DRAM."""
        return self.hbm is not None

    @property
    def fastest(self) -> TierPlan:
        """The HBM tier, or DRAM without one."""
        return self.hbm or self.dram

    @property
    def copied(self) -> tuple[Key, ...]:
        """Units that every pass copies up to the HBM tier; none without one."""
        return self.fastest.passing if self.has_hbm else ()

    @property
    def streamed(self) -> tuple[Key, ...]:
        """Units that every pass reads from the SSD."""
        return self.dram.passing

    @property
    def still(self) -> bool:
        """Whether a pass moves nothing, for all units stay in the fastest tier."""
        return not self.fastest.passing

    def resident(self, matrices: Iterable[Sequence[Key]]) -> list[tuple[Key, ...]]:
        """Of each matrix, given as the units of its planes, those that a resident pass does with.

        They stay in the fastest tier, up to the first one that does not; never all of them, so that where everything
        stays drafting still reads a precision less.
        """
        staying = frozenset(self.fastest.placement.pinned)
        return [tuple(takewhile(staying.__contains__, units[:-1])) for units in matrices]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"hbm": asdict(self.hbm) if self.hbm else None, "dram": asdict(self.dram)}

    def tables(self) -> tuple[Table, ...]:
        """What each tier's bytes are for."""
        return (table_of(self.to_dict()),)


@dataclass
class TooSmallError(Exception):
    """A tier's budget does not hold the smallest working set.

    Attributes:
        tier: its name.
        missing_bytes, capacity_bytes: of its budget.
        reserved: what is spoken for beside the units, by purpose.
        largest, largest_bytes: the largest unit.
        first_level_bytes: what all first planes take where these must stay; None where matrices are whole.
    """

    tier: str
    missing_bytes: int
    capacity_bytes: int
    reserved: Mapping[str, int]
    largest: str
    largest_bytes: int
    first_level_bytes: int | None


def fill_tiers(
    inputs: PlanInputs, *, hbm_bytes: int | None, dram_bytes: int, prefetch_bytes: int = DEFAULT.prefetch_bytes
) -> Plan:
    """Fill the tiers, fastest first; `prefetch_bytes` as of `Settings`.

    Raises:
        TooSmallError: the smallest working set does not fit; says of which tier how many bytes are missing.
    """
    if hbm_bytes is None:
        reserved = {**inputs.dram, **inputs.compute}
        return Plan(None, _tier("dram", dram_bytes, reserved, inputs, inputs.order, inputs.table, prefetch_bytes))
    table = None if inputs.only_rows else inputs.table
    hbm = _tier("hbm", hbm_bytes, inputs.compute, inputs, inputs.order, table, prefetch_bytes)
    left = hbm_bytes - sum(inputs.compute.values()) - hbm.slab_bytes
    hbm = replace(hbm, neuron_bytes=min(left, inputs.neuron_bytes))
    staying = replace(inputs, always=inputs.always.union(inputs.only_rows), levels=())
    rest = [*(key for key in inputs.order if key not in set(hbm.placement.pinned)), *inputs.only_rows]
    passing = [inputs.sizes[key] for key in hbm.placement.pinned]
    largest = max(passing, default=0)  # each passes through main memory once
    table = None if hbm.table else inputs.table
    dram = _tier("dram", dram_bytes, inputs.dram, staying, rest, table, prefetch_bytes, largest)
    spare = dram_bytes - sum(inputs.dram.values())
    return Plan(hbm, replace(dram, transit_bytes=min(spare, 2 * largest + prefetch_bytes, sum(passing))))


def table_of(placement: Mapping[str, Any]) -> Table:
    """What each tier's bytes are for, of a plan as plain data."""
    tiers = {name: tier for name in ("hbm", "dram") if (tier := placement[name]) is not None}
    columns = {name: _uses(tier) for name, tier in tiers.items()}
    purposes = dict.fromkeys(purpose for uses in columns.values() for purpose in uses)
    rows = [(purpose, *(uses.get(purpose, "") for uses in columns.values())) for purpose in purposes]
    return Table("What lies where", ("", *tiers), tuple(rows))


def _uses(tier: Mapping[str, Any]) -> dict[str, str]:
    placed, reserved = tier["placement"], tier["reserved_bytes"]
    staying = len(placed["pinned"])
    slab = max(placed["pinned_bytes"] + placed["ring_bytes"], tier["transit_bytes"])
    taken = slab + tier["neuron_bytes"] + sum(reserved.values())
    return {
        "budget": human(tier["capacity_bytes"]),
        "weights that stay": human(placed["pinned_bytes"]),
        "ring for those that pass through": human(slab - placed["pinned_bytes"]),
        "slots of single neurons": human(tier["neuron_bytes"]),
        **{purpose: human(nbytes) for purpose, nbytes in reserved.items()},
        "free": human(tier["capacity_bytes"] - taken),
        "units that stay": str(staying),
        "units that pass through": str(len(tier["order"]) - staying),
    }


def _tier(
    name: str,
    capacity_bytes: int,
    reserved: Mapping[str, int],
    inputs: PlanInputs,
    order: Sequence[Key],
    table: Key | None,
    prefetch_bytes: int,
    least_bytes: int = 0,
) -> TierPlan:
    always = inputs.always.union(*inputs.levels[:1]).intersection(order)
    spare = capacity_bytes - sum(reserved.values())
    smallest = max(least_bytes, pinned.smallest_bytes(order, inputs.sizes, always, inputs.together))
    _refuse_if_small(name, spare - smallest, capacity_bytes, reserved, inputs)
    if table is not None:
        size = inputs.sizes[table]
        whole = sum(inputs.sizes[key] for key in order) + size
        if whole <= spare:  # the table is the last to get room: a token inputs only one row of it
            placement = UnitPlacement((*order, table), whole, 0)
            return TierPlan(capacity_bytes, reserved, (*order, table), placement, True)
    ahead, levels, groups = min(prefetch_bytes, spare // 4), inputs.levels, inputs.together
    placement = pinned.place(order, inputs.sizes, spare, ahead, always, prefer=levels, together=groups)
    return TierPlan(capacity_bytes, reserved, tuple(order), placement, False)


def _refuse_if_small(
    name: str, left_bytes: int, capacity_bytes: int, reserved: Mapping[str, int], inputs: PlanInputs
) -> None:
    if left_bytes >= 0:
        return
    in_order = set(inputs.order)
    largest = max(inputs.sizes, key=lambda key: inputs.sizes[key] if key in in_order else 0)
    first = sum(inputs.sizes[key] for key in inputs.levels[0]) if inputs.levels else None
    raise TooSmallError(
        name, -left_bytes, capacity_bytes, reserved, inputs.names[largest], inputs.sizes[largest], first
    )
