"""What a calibration was asked for."""

from dataclasses import dataclass
from typing import Literal

from tiercache.config.sizes import Budget

Objective = Literal["loss", "entropy"]
Rest = Literal["int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a calibration was asked for; see `tiercache.calibrate.command`."""

    tokens: int
    window: int
    measure_tokens: int
    precision: Rest
    objective: Objective
    predictor_rank: int | None
    hbm: Budget | None
    dram: Budget
    context: int
    device: str
    show_progress: bool | None
