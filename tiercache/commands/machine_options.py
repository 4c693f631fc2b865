"""The machine and the model that commands of `tiercache-profile` are asked about: their options, and what they mean."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from profiler.cost_model import Drafting
from profiler.energy import G_PER_KWH, LIFETIME_YEARS, EnergyInputs
from profiler.hardware import Catalogue, Hardware, HardwareError, catalogue
from profiler.workload import Workload
from tiercache.config.sizes import AUTO_FRACTION, Budget, human
from tiercache.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:  # it imports torch, which --help should not cost
    from tiercache.engine.prediction import PredictedDrafting

NO_GPU, THIS_MACHINE = "none", "this"
DRAM, DRAM_KIND, SSD = "64GiB", "ddr4-3200", "pcie-3"
DRAFT_DEPTH = 8  # passes of a small model for a tree
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*GB/s", re.IGNORECASE)

Model = Annotated[str, typer.Argument(help="A named shape, a config.json, or a folder with one.")]
Gpu = Annotated[
    str, typer.Option(help="A card of the table, such as 3090; none for the CPU alone; this for what probe measured.")
]
Dram = Annotated[str | None, typer.Option(help="Main memory; 64GiB, or what this machine has free.")]
DramKind = Annotated[str, typer.Option("--dram-kind", help="Kind of main memory, two channels.")]
Ssd = Annotated[str, typer.Option(help="Kind of SSD, or its rate: 3.5GB/s.")]
Lanes = Annotated[int | None, typer.Option(min=1, max=16, help="PCIe lanes of the card's slot.")]
Precision = Annotated[str, typer.Option(help="source, int8, int4 or int3.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of KV cache.")]
Past = Annotated[int, typer.Option(min=0, help="Tokens before the one that is decoded.")]
HardwareFile = Annotated[Path | None, typer.Option("--hardware", help="A TOML file of hardware of your own.")]

_drafts = partial(typer.Option, rich_help_panel="Drafting")
_energy = partial(typer.Option, rich_help_panel="Energy and carbon")
DraftNodes = Annotated[int, _drafts(min=0, help="Nodes of a tree of drafts; 0 for none.")]
TokensPerPass = Annotated[float, _drafts(min=1, help="Tokens that a drafted pass emits.")]
DraftS = Annotated[float, _drafts(min=0, help="Seconds that making a tree takes.")]
Drafter = Annotated[str | None, _drafts(help="A small model that drafts, named as MODEL is.")]
DraftDepth = Annotated[int, _drafts(min=1, help="Passes of it for a tree.")]
CarbonIntensity = Annotated[float, _energy(min=0, help="Grams of CO2e that a kWh emits.")]
EmbodiedKg = Annotated[float | None, _energy(min=0, help="Kilograms of CO2e that making the card emitted.")]
LifetimeYears = Annotated[float, _energy(min=0.1, help="Years of use that these are spread over.")]


@dataclass(frozen=True)
class Question:
    """What a command that predicts is asked, as people give it; fields are named as the command's options."""

    model: str
    gpu: str = "3090"
    dram: str | None = None
    dram_kind: str = DRAM_KIND
    ssd: str = SSD
    lanes: int | None = None
    precision: str = "int4"
    context: int = 4096
    past: int = 512
    draft_nodes: int = 0
    tokens_per_pass: float = 1.0
    draft_s: float = 0.0
    drafter: str | None = None
    draft_depth: int = DRAFT_DEPTH
    file: Path | None = None
    carbon_intensity: float = G_PER_KWH
    embodied_kg: float | None = None
    lifetime_years: float = LIFETIME_YEARS

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Question":
        """From the options of a command, which may have more of them, and may leave out those of energy."""
        return cls(**{item.name: options[item.name] for item in fields(cls) if item.name in options})

    @property
    def machine(self) -> Hardware:
        """The machine that is meant; raises as `machine_of` does."""
        return machine_of(known_hardware(self.file), self.gpu, self.dram, self.dram_kind, self.ssd, self.lanes)

    def answer(self) -> dict[str, Any]:
        """The prediction, as plain data.

        Raises:
            UsageError: something that cannot be meant.
            DoesNotFitError: the model does not fit into the machine; says what to raise.
        """
        from tiercache.engine.prediction import predicted

        machine = self.machine
        drafts, workload = self.drafts(machine), self.workload(machine)
        with ways_out(machine):
            found = predicted(workload, machine, self.past, drafts, self.energy_inputs(machine))
        return {
            "schema": "tiercache.prediction/1",
            "model": self.model,
            "gpu": self.gpu,
            "dram": self.dram or human(machine.dram.capacity_bytes),
            "ssd": f"{machine.ssd_gbps.value:.1f}GB/s" if self.gpu == THIS_MACHINE else self.ssd,
            **found,
        }

    def workload(self, machine: Hardware) -> Workload:
        """The model's; raises as `workload_of_name` does."""
        return workload_of_name(self.model, machine, self.precision, self.context, self.past)

    def drafts(self, machine: Hardware) -> "PredictedDrafting | None":
        """How it drafts; None where it does not.

        Raises:
            UsageError: options of drafting that contradict one another.
        """
        from tiercache.engine.prediction import PredictedDrafting

        if (self.drafter is not None or self.draft_s or self.tokens_per_pass > 1) and not self.draft_nodes:
            raise UsageError("what drafting brings depends on the tree; give --draft-nodes, such as 64")
        if self.drafter is not None and self.draft_s:
            raise UsageError("--draft-s and --drafter are two ways to say what drafting takes; leave one of them out")
        if not self.draft_nodes:
            return None
        small = None
        if self.drafter is not None:
            small = workload_of_name(self.drafter, machine, "source", self.context, self.past)
        drafting = Drafting(self.draft_nodes, self.tokens_per_pass, self.draft_s)
        return PredictedDrafting(drafting, small, self.draft_depth)

    def energy_inputs(self, machine: Hardware) -> EnergyInputs:
        """What energy and carbon are counted with."""
        return EnergyInputs.of(
            machine,
            g_per_kwh=_unless(self.carbon_intensity, G_PER_KWH),
            embodied_kg=self.embodied_kg,
            lifetime_years=_unless(self.lifetime_years, LIFETIME_YEARS),
        )


@contextmanager
def ways_out(machine: Hardware) -> Iterator[None]:
    """Adds to a `DoesNotFitError` of a predicted machine what to raise, in this command's own options."""
    try:
        yield
    except DoesNotFitError as error:
        capacity = machine.gpu.memory.capacity_bytes if error.tier == "hbm" and machine.gpu else None
        have = machine.dram.capacity_bytes if capacity is None else capacity
        needed = have + ceil(error.missing_bytes / AUTO_FRACTION)
        if capacity is None:
            way_out = f"give --dram {ceil(needed / 2**30)}GiB or more"
        else:
            way_out = f"name a card with {human(needed)} or more with --gpu (see tiercache-profile hardware)"
        what = str(error).rpartition(";")[0]
        for tier, whose in (("hbm", "the card's memory"), ("dram", "main memory")):  # nobody has given --hbm
            what = re.sub(rf"^{tier}=(\S+ \S+) is", rf"nine tenths of {whose}, \1, are", what)
        message = f"{what}; {way_out}, or lower --context or --precision"
        raise DoesNotFitError(message, missing_bytes=error.missing_bytes, tier=error.tier) from error


def known_hardware(file: Path | None) -> Catalogue:
    """The hardware that is known, with a file of the user's own.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        return catalogue() if file is None else catalogue().with_file(file)
    except HardwareError as error:
        raise UsageError(str(error)) from error


def machine_of(
    known: Catalogue,
    gpu: str,
    dram: str | None = None,
    kind: str = DRAM_KIND,
    ssd: str = SSD,
    lanes: int | None = None,
) -> Hardware:
    """The machine that options mean; arguments as people give them.

    Raises:
        UsageError: no such part, no such size, or nothing was measured of this machine.
    """
    size = Budget.parse(dram or DRAM).size_bytes
    if size is None:
        raise UsageError(f"--dram {dram} is no size of a machine's memory; give one such as 64GiB")
    if gpu == THIS_MACHINE:
        from tiercache.engine.machine import resolve_device
        from tiercache.engine.probe_cache import this_machine

        if (kind, ssd, lanes) != (DRAM_KIND, SSD, None):
            raise UsageError(f"--gpu {THIS_MACHINE} is as it was measured; leave out --dram-kind, --ssd and --lanes")
        measured = this_machine(resolve_device("auto"))
        return measured if dram is None else replace(measured, dram=replace(measured.dram, capacity_bytes=size))
    rate = _RATE.fullmatch(ssd)
    try:
        reads = float(rate[1]) if rate else ssd
        return known.machine(None if gpu == NO_GPU else gpu, dram_bytes=size, dram=kind, ssd=reads, lanes=lanes)
    except HardwareError as error:
        raise UsageError(str(error)) from error


def workload_of_name(model: str, machine: Hardware, precision: str, context: int, past: int) -> Workload:
    """The workload of a named shape or of a `config.json`, computed by the machine's card or by its CPU.

    Raises:
        UsageError: no such model or precision, or `past` leaves no room in `context`.
    """
    from tiercache.bench.shapes import SHAPES
    from tiercache.model import meta_model
    from tiercache.store.checkpoint import resolve

    if past >= context:
        raise UsageError(f"--past {past} leaves no room in --context {context}; raise the second")
    if model.lower() in SHAPES:
        return _of_shape(model.lower(), precision, context, *computing(machine))
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not folder.is_dir() and not (folder.is_file() and folder.suffix == ".gguf"):
        raise UsageError(
            f"{model!r} is no folder, no GGUF file, no file called config.json and none of {', '.join(SHAPES)}; "
            "name one of these"
        )
    return _imagined(meta_model.read_config(resolve(folder)), precision, context, *computing(machine))


@cache
def _of_shape(name: str, precision: str, context: int, on_card: bool, capability: tuple[int, int] | None) -> Workload:
    """A 70B takes seconds, and who compares machines asks for it again and again."""
    from tiercache.bench.shapes import SHAPES

    return _imagined(SHAPES[name].config(), precision, context, on_card, capability)


def computing(machine: Hardware) -> tuple[bool, tuple[int, int] | None]:
    """Whether a card computes, and its capability: machines alike in these have the same workload of a model."""
    return machine.gpu is not None, machine.gpu.capability if machine.gpu else None


def _imagined(config: Any, precision: str, context: int, on_card: bool, capability: tuple[int, int] | None) -> Workload:
    from tiercache.config.options import OffloadConfig
    from tiercache.engine.workload import imagined_workload

    options = OffloadConfig(hbm=None, dram=Budget(), precision=precision, context=context)  # type: ignore[arg-type]
    return imagined_workload(config, options, gpu=on_card, capability=capability)


def _unless(value: float, default: float) -> float | None:
    """An option that was given; None for its default, which has a source of its own."""
    return None if value == default else value
