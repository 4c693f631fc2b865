"""`bench model`, `bench kernels`, `bench drafters`: speeds, each beside what the same machine could do at that time."""

from pathlib import Path
from typing import Annotated

import typer

from tiercache.commands.base import Json, LinkGbps, Quiet, app, progress, tell
from tiercache.commands.old_bench import OldSpelling
from tiercache.commands.running import PICO
from tiercache.config.options import STORE_PRECISION
from tiercache.errors import UsageError

bench = typer.Typer(cls=OldSpelling)
app.add_typer(bench, name="bench", help="Time a model, the kernels or the drafters.")

_Hbm = Annotated[str | None, typer.Option(help="Budget of the fastest tier; none by default.")]
_Dram = Annotated[str, typer.Option(help="Budget of main memory.")]
_Folder = Annotated[Path, typer.Option(help="Where models are made, and found again.")]
_FOLDER = Path("tiercache-bench")
# Options that the benchmarks call alike, and take as they are.
_OF_MODEL = ("shape", "hbm", "dram", "tokens", "bytes_per_token", "link_gbps", "context", "seed", "keep")
_OF_DRAFTERS = (
    *("text", "prompts", "prompt_tokens", "tokens", "plain_tokens", "repeats"),
    *("precision", "hbm", "dram", "link_gbps", "context"),
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
    folder: _Folder = _FOLDER,
    keep: Annotated[bool, typer.Option(help="Leave the model in the folder.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a model of random weights against the roofs of the disk and of main memory."""
    from tiercache.bench import model

    chosen = {name: ctx.params[name] for name in _OF_MODEL} | {"folder": folder.expanduser()}
    chosen["precision"] = precision or ("source" if bytes_per_token is None else STORE_PRECISION)
    result = model.bench(model.Options(**chosen, show_progress=progress(as_json, quiet)))
    tell(model.report(result), result, as_json=True, quiet=quiet)  # a benchmark always ends with its line


@bench.command("kernels")
def kernels_command(
    kernel_shapes: Annotated[str | None, typer.Option(help="7b by default; also 70b and others.")] = None,
    precisions: Annotated[str | None, typer.Option(help="int3,int4,int8 by default.")] = None,
    token_counts: Annotated[str | None, typer.Option(help="1,4,16,32,64 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and inputs.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the products of planes against the memory's roof, and against torch's own products."""
    from tiercache.bench import kernels, kernels_report

    lists = kernels.parse(kernel_shapes, precisions, token_counts)
    result = kernels.bench(kernels.Options(**lists, seed=seed, show_progress=progress(as_json, quiet)))
    tell(kernels_report.report(result), result, as_json=True, quiet=quiet)


@bench.command("drafters")
def drafters_command(
    ctx: typer.Context,
    model: Annotated[list[Path] | None, typer.Option(help="A checkpoint or store; several.")] = None,
    drafter_names: Annotated[
        str | None, typer.Option(help="ngram,lookup,suffix,recycling,trigram,resident,auto.")
    ] = None,
    growers: Annotated[str, typer.Option(help="best-first,fixed-width,sequoia,rsd-c,rsd-s.")] = "best-first",
    draft_nodes: Annotated[str | None, typer.Option(help="Sizes of trees; 4,16,64,auto by default.")] = None,
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
    cap: Annotated[str | None, typer.Option(help="RAM of each process, page cache included, such as 1434MiB.")] = None,
    widen: Annotated[str | None, typer.Option(help="Make the model HIDDENxNEURONSxLAYERS in --folder first.")] = None,
    folder: _Folder = _FOLDER,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time decoding with each drafter against plain decoding."""
    from tiercache.bench import drafters, drafters_options, drafters_report

    if not model and not PICO.is_dir():
        raise UsageError(f"the bundled model is not here ({PICO}); name one with --model")
    chosen = drafters_options.parse(
        drafters=drafter_names, nodes=draft_nodes, growers=growers, temperatures=temperatures, seeds=seeds
    )
    chosen |= {name: ctx.params[name] for name in _OF_DRAFTERS} | drafters_options.sizes(cap, widen)
    chosen |= {"models": tuple(model or [PICO]), "folder": folder.expanduser()}
    result = drafters.bench(drafters_options.Options(**chosen, show_progress=progress(as_json, quiet)))
    tell(drafters_report.report(result), result, as_json=True, quiet=quiet)
