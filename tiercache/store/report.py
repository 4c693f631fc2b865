"""What a conversion did, or would do, for a person and as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tiercache.store.writer import Compression


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        store: the folder.
        source_bytes: bytes of the checkpoint's tensors.
        store_bytes: bytes of the finished store, catalogue and copied files included; exact when nothing is
            compressed, else what it came to.
        free_bytes: free on the store's disk before the start.
        resumed_bytes: bytes of the checkpoint that an earlier run had done.
        seconds: how long it took; 0 for a dry run.
        calibrating_s: how long calibrating will take, as samples on this machine say; 0 where codes are rounded.
        calibrating_bytes: the memory that it will take, beside what the process holds already.
        bits: a weight, at each precision, with scales and factors.
        calibration: how codes were chosen: "gptq" with the text's hash and tokens, or "rounding".
        compression: by file: ratio, what zstd saves and costs in seconds per GB, and whether it is used.
    """

    store: str
    source_bytes: int
    store_bytes: int
    free_bytes: int
    resumed_bytes: int = 0
    seconds: float = 0.0
    calibrating_s: float = 0.0
    calibrating_bytes: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    compression: Compression | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": "tiercache.convert/1", **asdict(self)}
