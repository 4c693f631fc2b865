"""Energy and carbon of a token: busy seconds times watts, and a share of what making the card emitted.

Knows seconds and watts; neither models nor plans. Carbon is operational plus embodied, as ACT defines it (Gupta et al.,
ISCA 2022): C = E x intensity + (t / lifetime) x C_embodied. M2Cache (arXiv 2410.14740, section 6.4) gives the watts of
memory and SSD and the intensity of its grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from profiler.figure import Figure
from profiler.hardware import Gpu, Hardware

How = Literal["estimated", "measured"]

_DRAM_W_PER_BYTE, _SSD_W = 26 / 256e9, 2.0
_M2CACHE = "M2Cache, arXiv 2410.14740, section 6.4"
G_PER_KWH = 820.0
# The limit of a usual desktop processor of eight cores. It is counted in full while the CPU multiplies or launches.
_CPU_W = 105.0
# What a card or processor draws of its limit while it waits: 25 to 35 W of a 3090's 350, about 50 of a P40's 250.
_IDLE_SHARE = 0.1
# A strong graphics card, where its own entry says nothing: Ecodiag (CNRS) has 60 kg +-85 %, and four years of use.
_CARD_KG, LIFETIME_YEARS = 60.0, 4.0
_ECODIAG = "assumed: a strong card by Ecodiag (CNRS), +-85 %"
_YEAR_S, _J_PER_KWH = 365 * 24 * 3600, 3.6e6


@dataclass(frozen=True)
class EnergyInputs:
    """What energy and carbon are counted with.

    Attributes:
        card_w: the card's limit; 0 without one.
        cpu_w: the processor's limit.
        idle_share: what either draws of its limit while it waits.
        dram_w: main memory, all of it, all the time.
        ssd_w: the SSD, all the time.
        g_per_kwh: grams of CO2e that a kWh of electricity emits.
        embodied_kg: kilograms of CO2e that making the card emitted; the rest of the machine is left out.
        lifetime_years: of use, over which these are spread.
    """

    card_w: Figure
    cpu_w: Figure
    idle_share: Figure
    dram_w: Figure
    ssd_w: Figure
    g_per_kwh: Figure
    embodied_kg: Figure
    lifetime_years: Figure

    @classmethod
    def of(
        cls,
        machine: Hardware,
        *,
        g_per_kwh: float | None = None,
        embodied_kg: float | None = None,
        lifetime_years: float | None = None,
    ) -> "EnergyInputs":
        """A machine's; what is not given is assumed, and says so."""
        card = machine.gpu
        return cls(
            card_w=Figure(card.power_w, source="the card's limit") if card else Figure(0.0, source="no card"),
            cpu_w=Figure(_CPU_W, source="assumed: eight desktop cores"),
            idle_share=Figure(_IDLE_SHARE, source="assumed"),
            dram_w=Figure(_DRAM_W_PER_BYTE * machine.dram.capacity_bytes, source=f"26 W for 256 GB ({_M2CACHE})"),
            ssd_w=Figure(_SSD_W, source=_M2CACHE),
            g_per_kwh=_given(g_per_kwh, Figure(G_PER_KWH, source=_M2CACHE)),
            embodied_kg=_given(embodied_kg, _embodied(card)),
            lifetime_years=_given(lifetime_years, Figure(LIFETIME_YEARS, source="assumed, as Ecodiag (CNRS) does")),
        )

    @property
    def figures(self) -> dict[str, Figure]:
        """Each by its name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Energy:
    """Of one token.

    Attributes:
        joules: by part: card, cpu, dram, ssd.
        operational_g: grams of CO2e of the electricity.
        embodied_g: the token's share of what making the card emitted, in grams of CO2e.
        how: "measured" where a meter read the joules.
    """

    joules: Mapping[str, float]
    operational_g: float
    embodied_g: float
    how: How = "estimated"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "joules_per_token": sum(self.joules.values()),
            "joules": dict(self.joules),
            "g_co2e_per_token": {"operational": self.operational_g, "embodied": self.embodied_g},
            "how": self.how,
        }


def energy_of_token(card_s: float, cpu_s: float, total_s: float, inputs: EnergyInputs) -> Energy:
    """The energy of a token that takes `total_s`, of which the card is busy `card_s` and the processor `cpu_s`."""
    idle = inputs.idle_share.value
    joules = {
        "card": inputs.card_w.value * _effective_s(card_s, total_s, idle),
        "cpu": inputs.cpu_w.value * _effective_s(cpu_s, total_s, idle),
        "dram": inputs.dram_w.value * total_s,
        "ssd": inputs.ssd_w.value * total_s,
    }
    operational = sum(joules.values()) / _J_PER_KWH * inputs.g_per_kwh.value
    share = total_s / (inputs.lifetime_years.value * _YEAR_S)
    return Energy(joules, operational, share * inputs.embodied_kg.value * 1e3)


def _effective_s(busy_s: float, total_s: float, idle_share: float) -> float:
    """Seconds at the limit that take as much energy as busy and idle seconds do."""
    busy = min(busy_s, total_s)
    return busy + idle_share * (total_s - busy)


def _embodied(card: Gpu | None) -> Figure:
    if card is None:
        return Figure(0.0, source="no card; the rest of the machine is left out")
    return card.embodied_kg or Figure(_CARD_KG, source=_ECODIAG)


def _given(value: float | None, otherwise: Figure) -> Figure:
    return otherwise if value is None else Figure(value, source="given")
