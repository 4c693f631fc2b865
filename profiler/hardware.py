"""A machine as a cost model sees it: its memories, links and processors, each with capacity and speed.

Knows data sheets (`hardware.toml`, and files of the user's own in that form). Measures nothing; that is `probe`'s.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from policies.tables import Shown, Table
from profiler.figure import Basis, Figure, table_of, weakest
from profiler.matmul_rates import MatmulRates
from profiler.overheads import ON_A_CARD, ON_THE_CPU
from profiler.read_rates import ReadRate

TABLE = Path(__file__).with_name("hardware.toml")
KINDS = ("gpu", "link", "dram", "ssd", "cpu")

# What of a data sheet's bandwidth is reached: 0.82 on an H100 while serving, 0.89 on an A800, 0.75 on an Orin
# (inference-sim #415, #436; LLM-Viewer); dual-channel DRAM 60 to 80 % (llmfit #703).
_GPU_MEMORY_SHARE, _DRAM_SHARE = 0.82, 0.75
# What of two kinds of work at once really overlaps. FlexGen's fit found less than all; nobody measured this machine.
_OVERLAP = 0.85
_NOTHING = Figure(0.0, "spec", "assumed")
_LINK_LATENCY_S, _FULL_LANES = 10e-6, 16
_LIKELY = "3090"
_UNITS = {"dram": "dram_gbps", "gpu memory": "gpu memory_gbps", "gpu": "gpu_tflops", "link": "link_gbps"}
_TYPES = ("fp16", "fp32")  # a card multiplies in the first that its entry lists


class HardwareError(ValueError):
    """There is no such hardware, or an entry that cannot be read; says what there is."""


@dataclass(frozen=True)
class Memory:
    """A memory: its bytes, and the bytes a second that are read from it, in 1e9."""

    capacity_bytes: int
    gbps: Figure


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: the maker's.
        memory: its own.
        compute_type: the data type it multiplies in.
        tflops: 1e12 operations a second of that type, dense.
        link_gbps: copies from pinned main memory, 1e9 bytes a second.
        power_w: its limit.
        embodied_kg: kilograms of CO2e that making it emitted; None where nobody says.
        capability: CUDA's, such as (8, 6); None where nobody says.
    """

    name: str
    memory: Memory
    compute_type: str
    tflops: Figure
    link_gbps: Figure
    power_w: float
    embodied_kg: Figure | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Hardware(Shown):
    """A machine.

    Attributes:
        gpu: its card; None where the CPU computes.
        dram: main memory.
        cpu_gflops: 1e9 operations a second of the CPU, fp32, all cores.
        ssd_gbps: 1e9 bytes a second of large direct reads.
        overlap: which share of copies, reads and products that could run at once does.
        layer_s: what a decoder layer costs beside its bytes and operations: Python, launches, synchronisation.
        fused_layer_s: the same of a layer whose halves are one call of the kernels each; None for `layer_s`.
        pass_s: what a pass costs so beside its layers.
        unit_s: what each unit that is read from the SSD or copied to the card costs so beside its bytes.
        link_latency_s: what each copy over the link costs beside its bytes.
        matmuls: what layers of each kind of weights were measured to take where the model computes; empty where nobody
            measured, and roofs, `layer_s` and `unit_s` stand in.
        reads: direct reads by their size and number at a time; empty where only `ssd_gbps` is known.
        attention_gflops: 1e9 operations a second of attention; None where nobody measured, and the CPU's or the card's
            rate stands in.
        loop_s, handover_s: of a short loop of plain Python, and of a small matrix that the cores hand to one another:
            the pace at which everything was measured; None where nobody did. Clocks change, and so does what other
            guests leave of a virtual machine.
        pace: how many times as long as then whatever the CPU does takes now, but for what memory takes to be read.
        fitted: by what the seconds of a part ("compute", "overhead", "ssd") are to be multiplied, as passes that were
            run have shown; empty where too few were.
        copies: 1e9 bytes a second over the link, by what is copied and how, as measured; for people.
        throttle_gbps: of copies to a region of main memory that stands in for a card; None where nothing slows them.
    """

    gpu: Gpu | None
    dram: Memory
    cpu_gflops: Figure
    ssd_gbps: Figure
    overlap: Figure
    layer_s: Figure
    fused_layer_s: Figure | None = None
    pass_s: Figure = _NOTHING
    unit_s: Figure = _NOTHING
    link_latency_s: float = _LINK_LATENCY_S
    matmuls: tuple[MatmulRates, ...] = ()
    reads: tuple[ReadRate, ...] = ()
    attention_gflops: Figure | None = None
    loop_s: Figure | None = None
    handover_s: Figure | None = None
    pace: float = 1.0
    fitted: Mapping[str, Figure] = field(default_factory=dict)
    copies: Mapping[str, Figure] = field(default_factory=dict)
    throttle_gbps: Figure | None = None

    @property
    def copy_gbps(self) -> float:
        """1e9 bytes a second of copies to the card, or to the region of main memory that stands in for one."""
        if self.gpu is not None:
            return self.gpu.link_gbps.value
        return (self.throttle_gbps or self.dram.gbps).value

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure, by name."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, Figure)} | {"dram": self.dram.gbps}
        if self.gpu is not None:
            found |= {"gpu memory": self.gpu.memory.gbps, "gpu": self.gpu.tflops, "link": self.gpu.link_gbps}
        for rates in self.matmuls:
            found |= rates.figures
        for rate in self.reads:
            found[f"reads of {rate.block_bytes >> 10} KiB, {rate.threads} at a time"] = rate.gbps
        found |= {f"copies, {name}": figure for name, figure in self.copies.items()}
        return found | {f"fitted, {name}": figure for name, figure in self.fitted.items()}

    @property
    def basis(self) -> Basis:
        """What the figure that is trusted least rests on; "fitted" where measured ones are corrected by runs."""
        found = weakest(list(self.figures.values()))
        return "fitted" if self.fitted and found == "measured" else found

    def tables(self) -> tuple[Table, ...]:
        """Every figure, with what it rests on."""
        who = "no card: the CPU computes" if self.gpu is None else self.gpu.name
        named = {_UNITS.get(name, name): figure for name, figure in self.figures.items()}
        return (table_of(f"{who}; {self.basis} figures", named),)


@dataclass(frozen=True)
class Catalogue:
    """Known hardware: of each kind the entries by their key."""

    entries: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def with_file(self, path: Path) -> "Catalogue":
        """The same with the entries of a TOML file, which win.

        Raises:
            HardwareError: it cannot be read, or holds something else.
        """
        import tomllib  # as long to import as the rest of this module

        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise HardwareError(f"{path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise HardwareError(f"{path} is no TOML file ({error})") from error
        for kind, entries in read.items():
            if kind not in KINDS or not isinstance(entries, dict):
                raise HardwareError(f"{path} has a table {kind!r}; there are {', '.join(KINDS)}")
        merged = {kind: {**self.entries.get(kind, {}), **read.get(kind, {})} for kind in KINDS}
        return Catalogue(merged)

    def entry(self, kind: str, name: str) -> Mapping[str, Any]:
        """The entry that a person means: "RTX 3090" and "3090" are one.

        Raises:
            HardwareError: there is none; names those that there are.
        """
        known = self.entries[kind]
        wanted = _plain(name)
        for key, found in known.items():
            if wanted in (_plain(key), _plain(found.get("name", key))):
                return found
        raise HardwareError(
            f"unknown {kind} {name!r}; there are {', '.join(known)}; another's figures go into a TOML file (--hardware)"
        )

    def gpu(self, name: str, lanes: int | None = None) -> Gpu:
        """A card by its data sheet, in a slot of `lanes` lanes."""
        found = self.entry("gpu", name)
        where = str(found.get("name", name))
        try:
            kind = next((name for name in _TYPES if name in found["tflops"]), None)
            if kind is None:
                raise HardwareError(f"the entry of {where} has no tflops of {' or '.join(_TYPES)}")
            link = self.entry("link", found["link"])
            share = min(lanes or _FULL_LANES, found.get("lanes", _FULL_LANES)) / _FULL_LANES
            gib, gbps = _figure(found, "memory_gib").value, _figure(found, "memory_gbps")
            memory = Memory(int(gib * 2**30), gbps.scaled(_GPU_MEMORY_SHARE))
            rate = _figure({**found, "tflops": found["tflops"][kind]}, "tflops")
            copies = _figure(link, "gbps").scaled(share)
            return Gpu(where, memory, kind, rate, copies, float(found["power_w"]), _embodied(found), _capability(found))
        except HardwareError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise HardwareError(
                f"the entry of {where} lacks {error}, or has it in another form; see hardware.toml"
            ) from error

    def gpu_of_driver(self, name: str) -> Gpu | None:
        """The card whose key is in a driver's name, such as "NVIDIA H100 80GB HBM3"; None where there is none."""
        told = name.lower()
        found = [key for key in self.entries["gpu"] if re.search(rf"(?<![a-z0-9]){_spaced(key)}(?![a-z0-9])", told)]
        return self.gpu(max(found, key=len)) if found else None

    def gpu_or_likely(self, name: str) -> Gpu:
        """The same; a card that no table knows is taken for one that this library is for, and its name says so."""
        return self.gpu_of_driver(name) or replace(self.gpu(_LIKELY), name=f"{name}, taken for a {_LIKELY}")

    def machine(
        self,
        gpu: str | None,
        *,
        dram_bytes: int,
        dram: str = "ddr4-3200",
        ssd: str | float = "pcie-3",
        cpu: str = "desktop-8-core",
        lanes: int | None = None,
    ) -> Hardware:
        """A machine put together from its parts.

        Args:
            gpu: the card; None for a machine without one.
            dram_bytes: main memory.
            dram: its kind, two channels.
            ssd: its kind, or 1e9 bytes a second of reads.
            cpu: the processor's kind.
            lanes: of the card's slot, where it has fewer than the card.

        Raises:
            HardwareError: no such part.
        """
        reads = (
            Figure(ssd, "spec", "given") if isinstance(ssd, float | int) else _figure(self.entry("ssd", ssd), "gbps")
        )
        card = None if gpu is None else self.gpu(gpu, lanes)
        return Hardware(
            gpu=card,
            dram=Memory(dram_bytes, _figure(self.entry("dram", dram), "gbps").scaled(_DRAM_SHARE)),
            cpu_gflops=_figure(self.entry("cpu", cpu), "gflops"),
            ssd_gbps=reads,
            overlap=Figure(_OVERLAP, "spec", "assumed"),
            **(ON_THE_CPU if card is None else ON_A_CARD)._asdict(),
        )


@cache
def catalogue() -> Catalogue:
    """The hardware that comes with the package."""
    return Catalogue().with_file(TABLE)


def _figure(entry: Mapping[str, Any], name: str) -> Figure:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise HardwareError(f"{name} = {value!r} is no number above zero")
    return Figure(float(value), "spec", _source(entry))


def _embodied(entry: Mapping[str, Any]) -> Figure | None:
    if "embodied_kg" not in entry:
        return None
    return replace(_figure(entry, "embodied_kg"), source=str(entry.get("embodied_source", "given")))


def _capability(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    major, _, minor = str(entry.get("capability", "")).partition(".")
    return (int(major), int(minor)) if major else None


def _source(entry: Mapping[str, Any]) -> str:
    return str(entry.get("source", "given"))


def _spaced(key: str) -> str:
    """A pattern of a card's key as drivers write it: "3090ti" as "3090 Ti"."""
    return re.sub(r"(?<=\d)(?=[a-z])|(?=super$)", r"\\s*", key)


def _plain(name: str) -> str:
    """A name without makers, blanks and dashes."""
    return re.sub(r"nvidia|geforce|tesla|rtx|gtx|[\s_-]", "", name.lower())
