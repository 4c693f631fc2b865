"""Joules that a machine's own counters saw: the card's by NVML, the processor's and its memory's by RAPL.

Cards before Volta have no counter of energy, and many systems show RAPL's to root alone. What has none
is left out.
"""

from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tiercache.tiers.device import on_gpu

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts while it is open.

    Attributes:
        joules: by part: "card", "cpu", "dram"; empty before it is closed, and where nothing counts.
    """

    def __init__(self, device: torch.device, rapl: Path = _RAPL) -> None:
        self.joules: dict[str, float] = {}
        self._device, self._rapl = device, rapl
        self._before: dict[str, tuple[str, float, float]] = {}

    def __enter__(self) -> "EnergyMeter":
        self._before = self._counters()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, (part, now, wraps_at) in self._counters().items():
            if name in self._before:
                taken = now - self._before[name][1]
                self.joules[part] = self.joules.get(part, 0.0) + (taken if taken >= 0 else taken + wraps_at)

    def of_tokens(self, tokens: int) -> dict[str, Any] | None:
        """Plain data of a run of so many tokens; None where nothing counted."""
        if not self.joules or not tokens:
            return None
        return {"how": "measured", "joules_per_token": sum(self.joules.values()) / tokens, "joules": dict(self.joules)}

    def _counters(self) -> dict[str, tuple[str, float, float]]:
        """Of each counter the part that it counts, its joules, and the joules at which it begins again."""
        return {**self._rapl_counters(), **self._card_counter()}

    def _rapl_counters(self) -> dict[str, tuple[str, float, float]]:
        found = {}
        for zone in sorted(self._rapl.glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text(encoding="ascii").strip()
                used, most = (int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError):  # for root alone, or another kind of zone
                continue
            part = "cpu" if name.startswith("package") else name
            if part in ("cpu", "dram"):  # cores and graphics are within the package
                found[zone.name] = (part, used / 1e6, most / 1e6)
        return found

    def _card_counter(self) -> dict[str, tuple[str, float, float]]:
        if not on_gpu(self._device):
            return {}
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return {}
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:  # no driver
            return {}
        try:
            card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")
            return {"nvml": ("card", nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3, 0.0)}
        except nvml.NVMLError:  # before Volta
            return {}
        finally:
            nvml.nvmlShutdown()
