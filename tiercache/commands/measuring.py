"""`bench`, `calibrate`, `quality`, `doctor`: what a machine does, and what a mode loses."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands.base import (
    ENVIRONMENT,
    Device,
    Dram,
    Hbm,
    Json,
    LinkGbps,
    Quiet,
    Store,
    StoreFolder,
    app,
    console,
    progress,
    say,
    tell,
)
from tiercache.commands.running import PICO
from tiercache.errors import UsageError

# Options of the three kinds of `bench`, by what they are for.
_Drafters = Annotated[bool, typer.Option("--drafters", help="Time decoding with each drafter against plain decoding.")]
_Models = Annotated[list[Path] | None, typer.Option("--model", help="drafters: a checkpoint or store; several.")]
_Text = Annotated[Path | None, typer.Option(help="drafters: a UTF-8 file of prompts; else Python's own library.")]
_Prompts = Annotated[int, typer.Option(help="drafters: for each seed, each its own.")]
_PromptTokens = Annotated[int, typer.Option(help="drafters: tokens of a prompt.")]
_PlainTokens = Annotated[int | None, typer.Option(help="drafters: that plain decoding writes; else --tokens.")]
_Temperatures = Annotated[str, typer.Option(help="drafters: a list; 0 is greedy.")]
_Seeds = Annotated[str, typer.Option(help="drafters: a list.")]
_Names = Annotated[str | None, typer.Option(help="drafters: ngram,lookup,suffix,recycling,trigram,resident,auto.")]
_Growers = Annotated[str, typer.Option(help="drafters: best-first,fixed-width,sequoia,rsd-c,rsd-s.")]
_Nodes = Annotated[str | None, typer.Option(help="drafters: sizes of trees; 4,16,64,auto by default.")]
_Repeats = Annotated[int, typer.Option(help="drafters: of everything, for medians.")]
_Cap = Annotated[str | None, typer.Option(help="drafters: RAM of each process, page cache included, such as 1434MiB.")]
_Widen = Annotated[str | None, typer.Option(help="drafters: make the model HIDDENxNEURONSxLAYERS in --folder first.")]
_Kernels = Annotated[bool, typer.Option("--kernels", help="Time the products of planes instead of a model.")]
_KernelShapes = Annotated[str | None, typer.Option(help="kernels: 7b by default; also 70b and others.")]
_Precisions = Annotated[str | None, typer.Option(help="kernels: int3,int4,int8 by default.")]
_TokenCounts = Annotated[str | None, typer.Option(help="kernels: 1,4,16,32,64 by default.")]
_Share = Annotated[float | None, typer.Option(help="Mixed mode, with this share of int8's bytes of neurons; lossy.")]


@app.command("bench")
def bench_command(
    ctx: typer.Context,
    shape: Annotated[str, typer.Option(help="A model's shape, such as tiny or llama-2-7b.")] = "tinyllama-1.1b",
    precision: Annotated[str | None, typer.Option(help="source, or int8 with --drafters; else int8, int4.")] = None,
    hbm: Annotated[str | None, typer.Option(help="Budget of the fastest tier; none by default.")] = None,
    dram: Annotated[str, typer.Option(help="Budget of main memory.")] = "auto",
    tokens: Annotated[int | None, typer.Option(min=1, help="To time: 8, or 128 with --drafters.")] = None,
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path("tiercache-bench"),
    bytes_per_token: _Share = None,
    link_gbps: LinkGbps = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of KV cache: 128, or what drafters need.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and inputs.")] = 0,
    keep: Annotated[bool, typer.Option(help="Leave the model in the folder.")] = True,
    kernels: _Kernels = False,
    kernel_shapes: _KernelShapes = None,
    precisions: _Precisions = None,
    token_counts: _TokenCounts = None,
    drafters: _Drafters = False,
    model: _Models = None,
    text: _Text = None,
    prompts: _Prompts = 3,
    prompt_tokens: _PromptTokens = 64,
    plain_tokens: _PlainTokens = None,
    temperatures: _Temperatures = "0.8,0",
    seeds: _Seeds = "0,1,2",
    drafter_names: _Names = None,
    growers: _Growers = "best-first",
    draft_nodes: _Nodes = None,
    repeats: _Repeats = 1,
    cap: _Cap = None,
    widen: _Widen = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a model, drafters or the kernels, beside roofs or plain runs of the same machine and minutes."""
    _refuse_idle(ctx, kernels, drafters)
    shown = progress(as_json, quiet)
    if kernels:
        _bench_kernels((kernel_shapes, precisions, token_counts), seed, shown, quiet)
    elif drafters:
        _bench_drafters(ctx.params, shown, quiet)
    else:
        options: dict[str, Any] = {"hbm": hbm, "dram": dram, "tokens": tokens or 8, "context": context or 128}
        options |= {"bytes_per_token": bytes_per_token, "link_gbps": link_gbps}
        options["precision"] = precision or ("source" if bytes_per_token is None else "int8")
        _bench_shape(shape, options, {"folder": folder.expanduser(), "seed": seed, "keep": keep}, shown, quiet)


_OF_KERNELS = ("kernel_shapes", "precisions", "token_counts")
_OF_DRAFTERS = (
    *("model", "text", "prompts", "prompt_tokens", "plain_tokens", "temperatures", "seeds", "drafter_names"),
    *("growers", "draft_nodes", "repeats", "cap", "widen"),
)
_OF_MODELS = ("precision", "hbm", "dram", "tokens", "folder", "link_gbps", "context")  # of shapes and drafters
_OF_SHAPES = ("shape", "bytes_per_token", "seed", "keep")


def _refuse_idle(ctx: Any, kernels: bool, drafters: bool) -> None:
    """Refuse options of another kind of benchmark, which would do nothing."""
    if kernels and drafters:
        raise UsageError("--kernels and --drafters are two benchmarks; leave one of them out")
    common = ("kernels", "drafters", "as_json", "quiet")
    own = (*_OF_KERNELS, "seed") if kernels else (*_OF_MODELS, *(_OF_DRAFTERS if drafters else _OF_SHAPES))
    for name in ctx.params:
        if name in (*own, *common) or ctx.get_parameter_source(name).name != "COMMANDLINE":
            continue
        option = "--" + name.replace("_", "-")
        if not kernels and not drafters:
            kind = "--kernels" if name in _OF_KERNELS else "--drafters"
            raise UsageError(f"{option} does nothing without {kind}; add that")
        kind = "--kernels" if kernels else "--drafters"
        options = ", ".join("--" + each.replace("_", "-") for each in own)
        raise UsageError(f"{option} does nothing with {kind}; leave it out; its own options are {options}")


def _bench_shape(shape: str, options: dict[str, Any], place: dict[str, Any], shown: bool | None, quiet: bool) -> None:
    from tiercache.bench import shape as shapes

    result = shapes.bench(shape, **options, **place, show_progress=shown)
    tell(shapes.report(result), result, as_json=True, quiet=quiet)  # a benchmark always ends with its line


def _bench_kernels(
    lists: tuple[str | None, str | None, str | None], seed: int, shown: bool | None, quiet: bool
) -> None:
    from tiercache.bench import kernels, kernels_report

    options = kernels.Options(**kernels.parse(*lists), seed=seed, show_progress=shown)
    result = kernels.bench(options)
    tell(kernels_report.report(result), result, as_json=True, quiet=quiet)


def _bench_drafters(given: dict[str, Any], shown: bool | None, quiet: bool) -> None:
    from tiercache.bench import drafters, drafters_options, drafters_report
    from tiercache.bench.widened import Size
    from tiercache.config import Budget

    models = given["model"] or [PICO]
    if not given["model"] and not PICO.is_dir():
        raise UsageError(f"the bundled model is not here ({PICO}); name one with --model")
    names = {"drafters": "drafter_names", "nodes": "draft_nodes"}
    lists = ("drafters", "nodes", "growers", "temperatures", "seeds")
    chosen = drafters_options.parse(**{name: given[names.get(name, name)] for name in lists})
    same = ("text", "prompts", "prompt_tokens", "plain_tokens", "repeats", "hbm", "dram", "link_gbps", "context")
    chosen |= {name: given[name] for name in same} | {"folder": given["folder"].expanduser()}
    if given["cap"] is not None and (cap := Budget.parse(given["cap"])).size_bytes is None:
        raise UsageError(f"--cap {given['cap']} is no size; give one such as 1434MiB")
    chosen["cap_bytes"] = None if given["cap"] is None else cap.size_bytes
    chosen["widen"] = None if given["widen"] is None else Size.parse(given["widen"])
    chosen |= {"tokens": given["tokens"] or 128, "precision": given["precision"] or "int8"}
    result = drafters.bench(drafters_options.Options(models=tuple(models), **chosen, show_progress=shown))
    tell(drafters_report.report(result), result, as_json=True, quiet=quiet)


@app.command("calibrate")
def calibrate_command(
    store: Store,
    text: Annotated[Path, typer.Option(help="A UTF-8 text like what the model will be used for.")],
    tokens: Annotated[int, typer.Option(help="Tokens of it to learn from, at most.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a pass.")] = 512,
    measure_tokens: Annotated[int, typer.Option(help="Tokens to measure settings on, in pieces of 64.")] = 1024,
    precision: Annotated[str, typer.Option(help="Rung of what is no neuron, in the settings: int8 or int4.")] = "int8",
    objective: Annotated[str, typer.Option(help="Of the search: loss, or entropy as M2Cache has it.")] = "loss",
    predictor_rank: Annotated[int | None, typer.Option(help="Train low-rank predictors, for the report.")] = None,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens that the budgets are laid out for.")] = None,
    device: Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn from a text what a store's neurons are worth, for mixed mode; goes on where it was interrupted."""
    from tiercache.calibrate.command import calibrate
    from tiercache.calibrate.report import report

    learnt: dict[str, Any] = {"tokens": tokens, "window": window, "measure_tokens": measure_tokens, "context": context}
    chosen: dict[str, Any] = {"precision": precision, "objective": objective, "predictor_rank": predictor_rank}
    place: dict[str, Any] = {"hbm": hbm, "dram": dram, "device": device, "restart": restart, "once": True}
    try:
        result = calibrate(store, text, **learnt, **chosen, **place, show_progress=progress(as_json, quiet))
    except KeyboardInterrupt:
        say(f"what is measured is kept in {store}; the same command goes on from there", quiet)
        raise
    tell(report(result), result, as_json, quiet)


@app.command("quality")
def quality_command(
    model: Annotated[str, typer.Argument(help="A checkpoint or plane store.", show_default=False)],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file to measure on.", show_default=False)],
    modes: Annotated[
        list[str],
        typer.Option("--mode", help="source, int8, int4, int3, mixed:0.5, mixed:1.2GB/int4, 'mixed:<=0.01'; several."),
    ] = ["int8", "int4", "int3"],  # noqa: B006 - typer copies it
    reference: Annotated[
        str,
        typer.Option(help="What the others are held against: int8, or source (of MODEL, a checkpoint; add --store)."),
    ] = "int8",
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of a pass.")] = 1,
    decode: Annotated[int, typer.Option(help="Tokens to decode for the speed; 0 measures none.")] = 16,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    store: StoreFolder = None,
    device: Device = "auto",
    tasks: Annotated[Path | None, typer.Option(help="Folder of lm-evaluation-harness tasks to run as well.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: items of each task.")] = None,
    length: Annotated[int, typer.Option(help="With --tasks: tokens of a request at most.")] = 2048,
    plot: Annotated[Path | None, typer.Option(help="Draw bytes against loss: a .png or .svg.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where the reference's logits lie meanwhile.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each mode loses against exact weights, and what it costs a token."""
    from tiercache.quality.command import quality
    from tiercache.quality.report import report

    measured: dict[str, Any] = {"tokens": tokens, "window": window, "batch": batch, "decode": decode}
    place: dict[str, Any] = {"hbm": hbm, "dram": dram, "store": store, "device": device, "scratch": scratch}
    more: dict[str, Any] = {"tasks": tasks, "limit": limit, "length": length, "plot": plot}
    shown = progress(as_json, quiet)
    result = quality(model, text, modes=modes, reference=reference, **measured, **place, **more, show_progress=shown)
    tell(report(result), result, as_json, quiet)


@app.command("doctor")
def doctor_command(
    store: Annotated[Path | None, typer.Option(help="Where stores are; by default the current folder.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at this machine; exit code 5 if something will not work."""
    from tiercache.doctor import report

    checks = report.diagnose(store)
    if not quiet:
        console().print(report.table(checks))
    tell("", report.to_dict(checks), as_json, quiet=True)
    if not report.works(checks):
        raise typer.Exit(ENVIRONMENT)
