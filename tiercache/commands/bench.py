"""`bench model`, `bench kernels`, `bench drafters`: speeds, each beside what the same machine could do at that time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from tiercache.commands.base import Json, LinkGbps, Quiet, app, begin, progress, tell
from tiercache.commands.old_bench import OldSpelling
from tiercache.commands.running import PICO
from tiercache.config.options import STORE_PRECISION
from tiercache.errors import UsageError

bench = typer.Typer(cls=OldSpelling)
app.add_typer(bench, name="bench", help="Time a model, the kernels or the drafters.")

_Hbm = Annotated[str | None, typer.Option(help="Budget of the fastest tier; none by default.")]
_Dram = Annotated[str, typer.Option(help="Budget of main memory.")]
# Options that are lists with commas, and what reads each part.
_LISTS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("shapes", "precisions", "drafters", "growers"), str),
        **dict.fromkeys(("token_counts", "seeds"), int),
        "temperatures": float,
        "nodes": lambda part: None if part == "auto" else int(part),
    }
)


@bench.command("model")
def model_command(
    ctx: typer.Context,
    shape: Annotated[str, typer.Option(help="A model's shape, such as tiny or llama-2-7b.")] = "tinyllama-1.1b",
    precision: Annotated[str | None, typer.Option(help="source, int8 or int4; int8 in mixed mode.")] = None,
    hbm: _Hbm = None,
    dram: _Dram = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 8,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Mixed mode, with this share of int8's bytes of neurons; lossy.")
    ] = None,
    link_gbps: LinkGbps = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of KV cache.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the weights and the prompt.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path("tiercache-bench"),
    keep: Annotated[bool, typer.Option(help="Leave the model in the folder.")] = True,
    show_overhead: Annotated[
        bool, typer.Option("--overhead", help="Tell instead what a layer costs, by cause, at int4 by default.")
    ] = False,
    place: Annotated[
        Path | None, typer.Option("--model", help="With --overhead: a checkpoint or store instead of a shape.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a model of random weights against the roofs of the disk and of main memory."""
    begin("bench model", as_json, quiet)
    given = {name: value for name, value in ctx.params.items() if name not in ("show_overhead", "place")}
    given = arguments({**given, "folder": folder})
    if show_overhead:
        from tiercache.bench import overhead

        named = ("shape", "precision", "hbm", "dram", "seed", "folder", "show_progress")
        found = overhead.bench(overhead.Options(model=place, **{name: given[name] for name in named if name in given}))
        tell(overhead.report(found), found, as_json=True, quiet=quiet)
        return
    if place is not None:
        raise UsageError("--model is for --overhead; the benchmark of passes makes models of random weights: --shape")
    from tiercache.bench import model

    chosen = {"precision": "source" if bytes_per_token is None else STORE_PRECISION, **given}
    result = model.bench(model.Options(**chosen))
    tell(model.report(result), result, as_json=True, quiet=quiet)  # a benchmark always ends with its line


@bench.command("kernels")
def kernels_command(
    ctx: typer.Context,
    shapes: Annotated[str | None, typer.Option("--kernel-shapes", help="7b by default; also 70b and others.")] = None,
    precisions: Annotated[str | None, typer.Option(help="int3,int4,int8 by default.")] = None,
    token_counts: Annotated[str | None, typer.Option(help="1,4,16,32,64 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and inputs.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the products of planes against the memory's roof."""
    begin("bench kernels", as_json, quiet)
    from tiercache.bench import kernels, kernels_report

    result = kernels.bench(kernels.Options(**arguments(ctx.params)))
    tell(kernels_report.report(result), result, as_json=True, quiet=quiet)


@bench.command("drafters")
def drafters_command(
    ctx: typer.Context,
    models: Annotated[list[Path] | None, typer.Option("--model", help="A checkpoint or store; several.")] = None,
    drafters: Annotated[
        str | None, typer.Option("--drafter-names", help="ngram,lookup,suffix,recycling,trigram,resident,auto.")
    ] = None,
    growers: Annotated[str, typer.Option(help="best-first,fixed-width,sequoia,rsd-c,rsd-s.")] = "best-first",
    nodes: Annotated[str | None, typer.Option("--draft-nodes", help="Sizes of trees; 4,16,64,auto by default.")] = None,
    temperatures: Annotated[str, typer.Option(help="A list; 0 is greedy.")] = "0.8,0",
    seeds: Annotated[str, typer.Option(help="A list.")] = "0,1,2",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file of prompts; else Python's own library.")] = None,
    prompts: Annotated[int, typer.Option(help="For each seed, each its own.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    plain_tokens: Annotated[int | None, typer.Option(help="That plain decoding writes; else --tokens.")] = None,
    repeats: Annotated[int, typer.Option(help="Of everything, for medians.")] = 1,
    precision: Annotated[str, typer.Option(help="source, int8 or int4.")] = "int8",
    hbm: _Hbm = None,
    dram: _Dram = "auto",
    link_gbps: LinkGbps = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of KV cache; by default what is needed.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time decoding with each drafter against plain decoding."""
    begin("bench drafters", as_json, quiet)
    from tiercache.bench import drafters as benchmark
    from tiercache.bench import drafters_options, drafters_report

    given = {**ctx.params, "models": models, "text": text}
    result = benchmark.bench(drafters_options.Options(**drafters_arguments(given)))
    tell(drafters_report.report(result), result, as_json=True, quiet=quiet)


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a benchmark's `Options` from the parameters of its command; what is None is left out.

    A caller puts the paths in itself: which type they have in a typer context depends on typer's version.

    Raises:
        UsageError: a list that is empty or cannot be read.
    """
    found: dict[str, Any] = {"show_progress": progress(given["as_json"], given["quiet"])}
    for name, value in given.items():
        if value is not None and name not in ("as_json", "quiet"):
            found[name] = _split(name.replace("_", " "), value, _LISTS[name]) if name in _LISTS else value
    return found


def drafters_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """As `arguments`, for the benchmark of drafters, whose model is the bundled one by default.

    Raises:
        UsageError: a list that is empty or cannot be read, or the bundled model is not there.
    """
    if not given["models"] and not PICO.is_dir():
        raise UsageError(f"the bundled model is not here ({PICO}); name one with --model")
    return {**arguments(given), "models": tuple(given["models"] or [PICO])}


def _split(what: str, text: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        found = tuple(read(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of {what}; give one such as 1,16") from error
    if not found:
        raise UsageError(f"an empty list of {what}; leave it out, or name some")
    return found
