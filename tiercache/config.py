"""What the user asks for: sizes, precisions and the options of one `offload`, checked before anything is touched.

Knows nothing of hardware: fractions and "auto" stay symbolic until `Budget.resolve` is given the numbers.
"""

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from tiercache.errors import UsageError

CALIBRATION_TOKENS = 16_384
"""Of a text that codes are calibrated on: some ten for each input of the widest matrix of a small model."""

Precision = Literal["source", "int8", "int4", "int3"]
SizeLike = int | float | str
KernelChoice = Literal["auto", "fast", "decode"]
Mode = Literal["exact", "mixed"]
GrowerName = Literal["best-first", "fixed-width", "rsd-c", "rsd-s", "sequoia"]
Verify = Literal["walk", "rejection", "typical"]
LEAST_KEPT = 64  # tokens of a prompt, half of which look at the others
Policy = Literal["auto", "atu", "lru", "lfru", "sieve", "hot"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**n for n, p in enumerate("kmgt", start=1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", re.IGNORECASE)

# What "auto" leaves to the rest of the machine.
AUTO_FRACTION = 0.9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes, a share of what the tier has, or "auto" (nine tenths of what is free).

    >>> Budget.parse("22GiB").resolve(total_bytes=24 << 30, free_bytes=23 << 30) == 22 << 30
    True
    """

    size_bytes: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, value: SizeLike) -> "Budget":
        """Read `"22GiB"`, `"48GB"`, `"50%"`, `0.5`, `"auto"` or a count of bytes.

        Raises:
            UsageError: the value is none of these, or not above zero.
        """
        if isinstance(value, str) and value.strip().lower() == "auto":
            return cls()
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UsageError(f"a budget is a size, a fraction or 'auto', not {value!r}; try '22GiB'")
        if isinstance(value, float):
            return cls._share(value, value)
        if isinstance(value, str):
            return cls._read(value)
        if value <= 0:
            raise UsageError(f"a budget of {value} bytes holds nothing; give a size above zero, such as '8GiB'")
        return cls(size_bytes=value)

    @classmethod
    def _read(cls, text: str) -> "Budget":
        match = _SIZE.fullmatch(text)
        if match is None:
            raise UsageError(f"cannot read the size {text!r}; write it as '22GiB', '48GB', '50%' or 'auto'")
        number, unit = Fraction(match[1]), match[2].lower()
        if unit == "%":
            return cls._share(float(number / 100), text)
        if unit not in _UNITS:
            raise UsageError(f"unknown unit in {text!r}; use B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or %")
        if unit == "" and "." in text:
            return cls._share(float(number), text)
        if (size_bytes := int(number * _UNITS[unit])) <= 0:
            raise UsageError(f"a budget of {text!r} holds nothing; give a size above zero, such as '8GiB'")
        return cls(size_bytes=size_bytes)

    @classmethod
    def _share(cls, fraction: float, shown: object) -> "Budget":
        if not 0 < fraction <= 1:
            raise UsageError(f"a fraction lies above 0 and at most 1, not {shown!r}; bytes have a unit: '1.5GiB'")
        return cls(fraction=fraction)

    def resolve(self, *, total_bytes: int, free_bytes: int) -> int:
        """Bytes of this budget on a tier that has `total_bytes`, of which `free_bytes` are free."""
        if self.size_bytes is not None:
            return self.size_bytes
        if self.fraction is not None:
            return int(self.fraction * total_bytes)
        return int(AUTO_FRACTION * free_bytes)


class MixedOptions(TypedDict, total=False):
    """Options of `offload` for choosing planes neuron by neuron; without them a model is run exactly.

    Attributes:
        mode: "exact", or "mixed": each token reads its more important neurons at more bits, others at fewer or not at
            all. That loses something, which `tiercache calibrate` has measured. `precision` is then the precision of
            everything that is no neuron.
        bytes_per_token: what a token may read of the neurons, ranking included: a share of what int8 reads of them
            (0.5), or a size ("1.2GB").
        max_loss: a bound of the loss (KL from int8 on the calibration text, nats a token); then as few bytes as that
            allows.
        policy: with an HBM tier, who stays in its slots: "atu", "lru", "lfru", "sieve" or "hot"; "auto" replays the
            calibration's trace.
        uploads: neurons that a token may bring into the slots of one layer's plane; others do with the planes at hand.
            None for as many as it wants.
        link_gbps: throttle copies to the HBM tier to so many 1e9 bytes a second, to stand in for another link, in
            either mode; what is measured then is emulated.
    """

    mode: Mode
    bytes_per_token: SizeLike | None
    max_loss: float | None
    policy: str
    uploads: int | None
    link_gbps: float | None


class DraftOptions(TypedDict, total=False):
    """Options of `offload` for drafting: `model.generate` then emits the same tokens in fewer passes.

    Attributes:
        drafter: "auto" (whoever is likely to pay for its room, or nobody; how much, is found out while decoding),
            "resident" (the model's own planes that are in the fastest tier), "ngram" (tables of the text so far), a
            small model's checkpoint with the same tokenizer, a `Drafter`, or None. Sampled tokens then depend on
            torch's seed, but on no drafter.
        grower: how trees grow: "best-first", "fixed-width" or "sequoia"; "rsd-c" or "rsd-s" draw by chance.
        draft_nodes, draft_depth: of a tree at most.
        draft_width: nodes that one drafting pass expands, and children that each gets.
        draft_fixed: always draft trees of this size, instead of the size that pays.
        verify: "walk"; "rejection" (recursive rejection sampling, with growers that draw); "typical", which is lossy.
        lossless: False permits what changes the output: verify="typical", `shift` and `speckv`.
        shift: RAPID's eta: how far the target's scores move towards a drafter that drew its tree (verify="rejection").
            Nothing is shifted where nothing was drawn, so with `draft_fixed` alone is a seed's text always the same.
        speckv: tokens of a prompt whose keys and values are kept; which, the drafted ones that follow help to choose.
        learned: a folder in which what was generated is counted, for n-grams of later runs.
    """

    drafter: object
    grower: str
    draft_nodes: int
    draft_depth: int
    draft_width: int
    draft_fixed: bool
    verify: Verify
    lossless: bool
    shift: float
    speckv: int | None
    learned: str | Path | None


class Options(MixedOptions, DraftOptions, total=False):
    """Everything that `offload` takes beside places and precisions."""


def read_options(options: Options) -> dict[str, Any]:
    """The options as fields of `OffloadConfig`.

    Raises:
        UsageError: an option that there is not, or a size that cannot be read.
    """
    mixed, drafts = MixedOptions.__annotations__, DraftOptions.__annotations__
    if unknown := sorted(set(options) - set(mixed) - set(drafts)):
        known = f"of mixed mode {', '.join(mixed)}; of drafting {', '.join(drafts)}"
        raise UsageError(f"unknown option {unknown[0]!r} of offload(); there are {known}")
    fields: dict[str, Any] = {name: value for name, value in options.items() if name in mixed}
    given = options.get("bytes_per_token")
    fields["bytes_per_token"] = None if given is None else Budget.parse(given)
    wanted: dict[str, Any] = {name: value for name, value in options.items() if name in drafts}
    if wanted.get("drafter") is None:
        if idle := sorted(set(wanted) - {"drafter", "lossless"}):
            raise UsageError(f"{idle[0]}= does nothing without a drafter; give drafter='auto', or leave it out")
        return fields
    return fields | {"draft": DraftConfig(**{name.removeprefix("draft_"): value for name, value in wanted.items()})}


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The options of drafting, checked; see `DraftOptions`.

    Attributes:
        drafter: a name, a path, or a `Drafter`.
        grower, verify, lossless, shift, speckv, learned, fixed: as there.
        nodes, depth, width: of a tree at most.
        slots: of the KV cache that a tree may take, its root and nodes tried but not kept included.
    """

    drafter: Any
    grower: str = "best-first"
    nodes: int = 64
    depth: int = 16
    width: int = 4
    fixed: bool = False
    verify: Verify = "walk"
    lossless: bool = True
    shift: float = 0.0
    speckv: int | None = None
    learned: str | Path | None = None

    def __post_init__(self) -> None:
        if self.grower not in get_args(GrowerName):
            raise UsageError(f"unknown grower {self.grower!r}; choose one of {', '.join(get_args(GrowerName))}")
        if self.verify not in get_args(Verify):
            raise UsageError(f"unknown verify={self.verify!r}; choose one of {', '.join(get_args(Verify))}")
        for name in ("nodes", "depth", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"draft_{name}={value!r} must be a whole number, 1 or more; try draft_{name}=16")
        if self.verify == "rejection" and not self.grower.startswith("rsd"):
            raise UsageError(
                f"verify='rejection' needs trees that are drawn, which grower={self.grower!r} does not; choose 'rsd-c' "
                "or 'rsd-s', or verify='walk'"
            )
        self._check_tables()
        self._check_losses()

    def _check_tables(self) -> None:
        """Refuse what only some drafters can do; a table of n-grams ranks, and never draws."""
        tables = isinstance(self.drafter, str) and self.drafter in ("auto", "ngram")
        if self.verify == "rejection" and tables:
            raise UsageError(
                f"verify='rejection' needs trees that are drawn, and n-grams, which drafter={self.drafter!r} uses, are "
                "not; choose 'resident' or a small model, or verify='walk'"
            )
        if self.learned is not None and not tables:
            raise UsageError("learned= keeps tables of n-grams; choose drafter='auto' or 'ngram', or leave it out")
        if not isinstance(self.learned, str | Path | None):
            raise UsageError(f"learned={self.learned!r} must be a folder, or None")
        for name, value in (("draft_fixed", self.fixed), ("lossless", self.lossless)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}={value!r} must be True or False")

    def _check_losses(self) -> None:
        """Refuse what changes the output, unless that is meant."""
        shift, speckv = self.shift, self.speckv
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 <= shift < float("inf"):
            raise UsageError(f"shift={shift!r} must be a number of 0 or more; try shift=0.5")
        if speckv is not None and (isinstance(speckv, bool) or not isinstance(speckv, int) or speckv < LEAST_KEPT):
            raise UsageError(f"speckv={speckv!r} must be a number of tokens, {LEAST_KEPT} or more; try speckv=1024")
        if shift and self.verify != "rejection":
            raise UsageError(
                f"shift= goes by what a drafter drew, and verify={self.verify!r} takes what it ranked; give "
                "verify='rejection' and grower='rsd-s' too"
            )
        if self.lossless and self.lossy:
            raise UsageError(f"what is emitted changes with {self.lossy}; say lossless=False if that is meant")

    @property
    def lossy(self) -> str:
        """What changes the output; empty where nothing does."""
        named = {
            "typical": self.verify == "typical",
            f"shift={self.shift:g}": self.shift > 0,
            f"speckv={self.speckv}": self.speckv is not None,
        }
        return " and ".join(name for name, there in named.items() if there)

    @property
    def slots(self) -> int:
        """See the class."""
        return 1 + max(self.nodes, self.depth * min(self.width, self.nodes))


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """The options of one `offload`, read and checked.

    Attributes:
        hbm: budget of the fastest tier; None where none was asked for.
        dram: budget of main memory.
        precision: the precision every pass is computed at.
        context: tokens, over the batch, for which the KV cache and the activations are reserved.
        logits: rows of logits one forward pass may return.
        device: "auto", "cpu", "cuda" or "cuda:N".
        store: folder of the plane store, if named.
        checks: verify every checksum before the model is handed out.
        kernels: "fast" multiplies by planes as they are, "decode" makes each weight first; "auto" is fast where it can
            be.
        cpu_tokens: up to how many tokens a pass has planes multiplied by the CPU in DRAM; None where it is measured.
        mode: "exact", or "mixed" for planes chosen by neuron and token, which loses something.
        bytes_per_token: mixed: what of int8's bytes of the neurons a token may read, ranking included.
        max_loss: mixed: bound of the loss that calibration measured, KL in nats a token.
        policy: mixed: who stays in the neurons' slots; "auto" replays the calibration's trace.
        uploads: mixed: neurons that a token may bring into the slots of a layer's plane; None for as many as it wants.
        link_gbps: throttle copies to the HBM tier to this rate; what is measured then is emulated.
        resident: units are cut by plane, so that passes may do with the planes that stay in the fastest tier.
        draft: how to draft, if at all.
    """

    hbm: Budget | None
    dram: Budget
    precision: Precision = "source"
    context: int = 4096
    logits: int = 512
    device: str = "auto"
    store: Path | None = None
    checks: bool = False
    kernels: KernelChoice = "auto"
    cpu_tokens: int | None = None
    mode: Mode = "exact"
    bytes_per_token: Budget | None = None
    max_loss: float | None = None
    policy: str = "auto"
    uploads: int | None = None
    link_gbps: float | None = None
    resident: bool = False
    draft: DraftConfig | None = None

    def __post_init__(self) -> None:
        self._check_mode()
        self._check_resident()
        if self.precision not in get_args(Precision):
            raise UsageError(f"unknown precision {self.precision!r}; choose one of {', '.join(get_args(Precision))}")
        if self.kernels not in get_args(KernelChoice):
            raise UsageError(f"unknown kernels {self.kernels!r}; choose one of {', '.join(get_args(KernelChoice))}")
        if self.cpu_tokens is not None and (
            isinstance(self.cpu_tokens, bool) or not isinstance(self.cpu_tokens, int) or self.cpu_tokens < 0
        ):
            raise UsageError(f"cpu_tokens={self.cpu_tokens!r} must be a whole number of tokens, 0 or more, or None")
        for name, value in (("context", self.context), ("logits", self.logits)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}={value!r} must be a whole number of tokens, 1 or more; try {name}=512")
        if not isinstance(self.device, str) or re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise UsageError(f"unknown device {self.device!r}; choose 'auto', 'cpu', 'cuda' or 'cuda:N'")

    def _check_resident(self) -> None:
        """Refuse resident passes where a matrix has no lower planes to do with."""
        if not self.resident:
            return
        if self.mode != "exact":
            raise UsageError(
                "mode='mixed' has resident passes of its own; leave resident= out, or ask for mode='exact'"
            )
        if self.precision not in ("int8", "int4"):
            raise UsageError(
                "resident passes (drafter='resident' takes them) do with fewer planes than precision="
                f"{self.precision!r} has; ask for 'int8' or 'int4', or drafter='ngram'"
            )
        if self.kernels == "decode":
            raise UsageError(
                "kernels='decode' makes a whole weight for every product, so resident passes would save nothing; leave "
                "kernels= out"
            )

    def _check_mode(self) -> None:
        """Refuse options of a mode that do not belong together."""
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if self.policy not in get_args(Policy):
            raise UsageError(f"unknown policy {self.policy!r}; choose one of {', '.join(get_args(Policy))}")
        for name, value in (("link_gbps", self.link_gbps), ("max_loss", self.max_loss)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"{name}={value!r} must be a number above zero, or None")
        if self.uploads is not None and (
            isinstance(self.uploads, bool) or not isinstance(self.uploads, int) or self.uploads < 0
        ):
            raise UsageError(f"uploads={self.uploads!r} must be a whole number of neurons, 0 or more, or None")
        if self.mode == "exact":
            if self.bytes_per_token is not None or self.max_loss is not None:
                raise UsageError("bytes_per_token= and max_loss= are for mode='mixed'; the exact mode reads every byte")
            if self.policy != "auto" or self.uploads is not None:
                raise UsageError("policy= and uploads= are for mode='mixed'; the exact mode has no slots of neurons")
            return
        if self.precision == "source":
            raise UsageError(
                "mode='mixed' is made of planes: give precision='int8' or 'int4', the precision of what is no neuron"
            )
        if self.kernels == "decode":
            raise UsageError(
                "mode='mixed' multiplies single neurons, which kernels='decode' cannot; leave kernels= out"
            )
        if self.max_loss is not None and not self.max_loss > 0:
            raise UsageError(f"max_loss={self.max_loss} must be above zero; a run without loss is mode='exact'")
        if self.bytes_per_token == Budget():
            raise UsageError("bytes_per_token='auto' says nothing; give a share such as 0.5, a size, or max_loss=")
        if self.bytes_per_token is None and self.max_loss is None:
            raise UsageError("mode='mixed' needs bytes_per_token= (a share of int8's bytes, or a size) or max_loss=")


def home_folder() -> Path:
    """Where stores and compiled kernels are kept: $TIERCACHE_HOME, or tiercache in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("TIERCACHE_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(home).expanduser() if home else cache / "tiercache"


def human(size_bytes: float) -> str:
    """Bytes as a person reads them: `human(1536) == '1.5 KiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
