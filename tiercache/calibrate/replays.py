"""What eviction policies would miss: each on the trace of the setting that half of int8's bytes are run with.

Knows a finished calibration and the sizes of a row.
"""

from dataclasses import asdict
from typing import Any

from policies.precision import TOP
from profiler import replay
from tiercache.engine import mixed_plan
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.store.calibration import Calibration, Setting
from tiercache.store.planestore import PlaneStore

SHARE = 0.5
SLOTS = 0.4
"""Slots of a plane, of all neurons."""


def policies(calibration: Calibration, store: PlaneStore) -> dict[str, Any] | None:
    """Every policy and Belady's bound, as plain data; None where no setting wants planes above its ranking's."""
    neurons = calibration.norms.shape[1]
    for setting in _candidates(calibration):
        wanted = [recipe.wanted(neurons)[setting.rank :] for recipe in setting.recipes]
        trace = MixedPlan(calibration, setting, (TOP,) * len(wanted)).trace(setting.rank)
        if trace is None or not any(map(any, wanted)):
            continue
        slots = [[round(SLOTS * neurons) if count else 0 for count in block] for block in wanted]
        sizes = mixed_plan.sizes_of(store.blocks()[0], store)
        widths = [sizes.parts * width for width in sizes.planes[setting.rank :]]
        rows = replay.compare(trace, slots, None, widths, hot=calibration.frequency)
        return {
            "share": setting.share,
            "rank": setting.rank,
            "slots": SLOTS,
            "tokens": trace.tokens,
            "rows": [{**asdict(row), "missed_bytes_per_token": row.missed_bytes / trace.tokens} for row in rows],
        }
    return None


def _candidates(calibration: Calibration) -> list[Setting]:
    """Those within the share, the one that would be run first: int3 ranks where there are slots."""
    within = [setting for setting in calibration.settings if setting.share <= SHARE + 1e-9]
    return sorted(within, key=lambda setting: (setting.rank, setting.kl, setting.read_bytes))
