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
    Precision,
    Quiet,
    Store,
    StoreFolder,
    app,
    console,
    progress,
    say,
    tell,
)
from tiercache.errors import UsageError


@app.command("bench")
def bench_command(
    ctx: typer.Context,
    shape: Annotated[str, typer.Option(help="A model's shape, such as tiny or llama-2-7b.")] = "tinyllama-1.1b",
    precision: Precision = "source",
    hbm: Annotated[str | None, typer.Option(help="Budget of the fastest tier; none by default.")] = None,
    dram: Annotated[str, typer.Option(help="Budget of main memory.")] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Single-token passes to time.")] = 8,
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path("tiercache-bench"),
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Mixed mode, with this share of int8's bytes of the neurons; lossy.")
    ] = None,
    link_gbps: LinkGbps = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens to reserve KV cache for.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the weights and inputs.")] = 0,
    keep: Annotated[bool, typer.Option(help="Leave the model in the folder.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time the products of planes instead of a model.")] = False,
    kernel_shapes: Annotated[
        str | None, typer.Option(help="With --kernels: 7b by default; also 70b and others.")
    ] = None,
    precisions: Annotated[str | None, typer.Option(help="With --kernels: int2,int4,int8 by default.")] = None,
    token_counts: Annotated[str | None, typer.Option(help="With --kernels: 1,4,16,32,64 by default.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a model of a given shape, or the kernels, on random weights, against roofs measured in the same run."""
    _refuse_idle(ctx, kernels)
    if kernels:
        _bench_kernels((kernel_shapes, precisions, token_counts), seed, as_json, quiet)
        return
    from tiercache.bench import shape as shapes

    options: dict[str, Any] = {"precision": precision, "hbm": hbm, "dram": dram, "tokens": tokens, "context": context}
    options |= {"bytes_per_token": bytes_per_token, "link_gbps": link_gbps}
    if bytes_per_token is not None and precision == "source":
        options["precision"] = "int8"
    place: dict[str, Any] = {"folder": folder.expanduser(), "seed": seed, "keep": keep}
    result = shapes.bench(shape, **options, **place, show_progress=progress(as_json, quiet))
    tell(shapes.report(result), result, as_json=True, quiet=quiet)  # a benchmark always ends with its line


def _refuse_idle(ctx: Any, kernels: bool) -> None:
    """Refuse options of the other kind of benchmark, which would do nothing."""
    of_kernels, common = ("kernel_shapes", "precisions", "token_counts"), ("kernels", "seed", "as_json", "quiet")
    for name in ctx.params:
        given = ctx.get_parameter_source(name).name == "COMMANDLINE"
        if given and name not in common and (name in of_kernels) != kernels:
            option = "--" + name.replace("_", "-")
            cure = "leave it out; its own options are --kernel-shapes, --precisions and --token-counts"
            how = f"with --kernels; {cure}" if kernels else "without --kernels; add that"
            raise UsageError(f"{option} does nothing {how}")


def _bench_kernels(lists: tuple[str | None, str | None, str | None], seed: int, as_json: bool, quiet: bool) -> None:
    from tiercache.bench import kernels, kernels_report

    options = kernels.Options(**kernels.parse(*lists), seed=seed, show_progress=progress(as_json, quiet))
    result = kernels.bench(options)
    tell(kernels_report.report(result), result, as_json=True, quiet=quiet)


@app.command("calibrate")
def calibrate_command(
    store: Store,
    text: Annotated[Path, typer.Option(help="A UTF-8 text like what the model will be used for.")],
    tokens: Annotated[int, typer.Option(help="Tokens of it to learn from, at most.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a pass.")] = 512,
    measure_tokens: Annotated[int, typer.Option(help="Tokens to measure settings on, in whole windows.")] = 1024,
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
        typer.Option("--mode", help="source, int8, int4, int2, mixed:0.5, mixed:1.2GB/int4, 'mixed:<=0.01'; several."),
    ] = ["int8", "int4", "int2"],  # noqa: B006 - typer copies it
    reference: Annotated[str, typer.Option(help="What the others are held against: int8 or source.")] = "int8",
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
    from tiercache import doctor

    checks = doctor.diagnose(store)
    if not quiet:
        console().print(doctor.table(checks))
    tell("", doctor.to_dict(checks), as_json, quiet=True)
    if not doctor.works(checks):
        raise typer.Exit(ENVIRONMENT)
