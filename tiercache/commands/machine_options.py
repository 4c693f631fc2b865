"""The machine and the model that commands of `tiercache-profile` are asked about: their options, and what they mean."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from profiler.hardware import Catalogue, Hardware, HardwareError, catalogue
from profiler.workload import Workload
from tiercache.config.sizes import Budget
from tiercache.errors import UsageError

NO_GPU, THIS_MACHINE = "none", "this"
DRAM, DRAM_KIND, SSD = "64GiB", "ddr4-3200", "pcie-3"
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
        from tiercache.engine.probe_cache import this_machine

        if (kind, ssd, lanes) != (DRAM_KIND, SSD, None):
            raise UsageError(f"--gpu {THIS_MACHINE} is as it was measured; leave out --dram-kind, --ssd and --lanes")
        measured = this_machine()
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
    from tiercache.config.options import OffloadConfig
    from tiercache.engine.workload import imagined_workload
    from tiercache.model import meta_model

    if past >= context:
        raise UsageError(f"--past {past} leaves no room in --context {context}; raise the second")
    options = OffloadConfig(hbm=None, dram=Budget(), precision=precision, context=context)  # type: ignore[arg-type]
    if model in SHAPES:
        config: Any = SHAPES[model].config()
    else:
        path = Path(model).expanduser()
        folder = path.parent if path.name == "config.json" else path
        if not folder.is_dir():
            raise UsageError(
                f"{model!r} is no folder, no file called config.json and none of {', '.join(SHAPES)}; name one of these"
            )
        config = meta_model.read_config(folder)
    return imagined_workload(config, options, gpu=machine.gpu is not None)
