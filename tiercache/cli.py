"""The command line: reads arguments, calls the library, tells people on standard error and programs on standard output.

Decides nothing of its own. Standard output carries data only: generated text, or one line of JSON. What went wrong ends
in the exit code of `tiercache.errors`.
"""

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from tiercache import __version__, summary
from tiercache.config import human
from tiercache.errors import ContextExceededError, DoesNotFitError, StoreError, TiercacheError, UsageError

# The commands import the library when they run, since torch and transformers take seconds that `--help` and a mistyped
# option should not cost.

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
PICO_PROMPT = "def read_lines(path):\n"
_UNEXPECTED, _ENVIRONMENT, _INTERRUPTED = 1, 5, 130
# typer's own complaints about arguments; its name for the class has moved between versions.
_ArgumentError = cast("type[Exception]", typer.BadParameter.__base__)

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary; errors only.")]
Precision = Annotated[str, typer.Option(help="source (the original weights), int8, int4 or int2.")]
Store = Annotated[Path, typer.Argument(help="Folder of a plane store.", show_default=False)]


class _Commands(TyperGroup):
    """Turns what a command raises into a line on standard error, JSON where it was asked for, and an exit code.

    Contexts are typed Any: typer brings click's classes under names that change with its version.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note early whether JSON is wanted: a complaint about other arguments must know."""
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except _ArgumentError as error:
            _print_error(error, str(error), 2, ctx.obj)
            raise  # typer shows it beside the command's usage
        except KeyboardInterrupt as error:
            raise _failed(error, "interrupted", _INTERRUPTED, ctx.obj, False) from error
        except TiercacheError as error:
            raise _failed(error, str(error), error.exit_code, ctx.obj, ctx.params["debug"]) from error
        except Exception as error:
            message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            message += "" if ctx.params["debug"] else "; for the traceback: tiercache --debug COMMAND ..."
            raise _failed(error, message, _UNEXPECTED, ctx.obj, ctx.params["debug"]) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 does not fit, 4 corrupt or another's store, 5 environment, "
    "130 interrupted. Environment: HF_HUB_OFFLINE and HF_HOME as the Hub has them; TIERCACHE_HOME (stores that are "
    "made when none is named; else ~/.cache/tiercache); CUDA_VISIBLE_DEVICES; NO_COLOR.",
)


def main() -> None:
    """The entry point."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tiercache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run language models much larger than the GPU they run on: exact, and within a memory budget."""


@app.command("convert")
def convert_command(
    checkpoint: Annotated[str, typer.Argument(help="A safetensors checkpoint: folder or Hub id.", show_default=False)],
    store: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    group: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    compress: Annotated[str, typer.Option(help="zstd: on, off, or auto where it saves more than it costs.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take; write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the plane store of a checkpoint; goes on where an interrupted conversion stopped."""
    from tiercache.store.convert import convert

    partial = store.expanduser().with_name(store.name + ".partial")
    try:
        options: dict[str, Any] = {"group": group, "compress": compress, "dry_run": dry_run, "restart": restart}
        report = convert(checkpoint, store, **options, show_progress=_progress(as_json, quiet))
    except KeyboardInterrupt:
        if partial.exists():
            _say(f"what is converted is kept in {partial}; the same command goes on from there", quiet)
        raise
    _tell(
        (summary.of_dry_run if dry_run else summary.of_conversion)(report.to_dict()), report.to_dict(), as_json, quiet
    )


@app.command("verify")
def verify_command(store: Store, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check every byte of a plane store against its checksums."""
    from tiercache.store.planestore import PlaneStore

    checked = PlaneStore.open(store).verify(show_progress=_progress(as_json, quiet))
    text = f"{checked.folder}: {checked.extents} extents, {human(checked.checked_bytes)}, all as written"
    _tell(text, {"schema": "tiercache.verify/1", **asdict(checked)}, as_json, quiet)


@app.command("inspect")
def inspect_command(store: Store, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what is in a plane store."""
    from tiercache.store.planestore import PlaneStore

    found = PlaneStore.open(store).describe()
    _tell(summary.of_store(found), found, as_json, quiet)


@app.command("run")
def run_command(
    model: Annotated[str | None, typer.Argument(help="A checkpoint or store; by default the bundled pico.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to continue; - reads standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    hbm: Annotated[str, typer.Option(help="Budget of the fastest tier: 22GiB, 90%, auto.")] = "auto",
    dram: Annotated[str, typer.Option(help="Budget of main memory: 48GiB, 50%, auto.")] = "auto",
    precision: Precision = "source",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of KV cache; by default what is needed.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where the checkpoint's plane store is, or is made.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    checks: Annotated[bool, typer.Option("--checks", help="Verify the store's checksums first.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among that many tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text. It streams to standard output; with --json one object comes at the end instead."""
    import tiercache
    from tiercache.store.source import resolve

    sampling = _sampling(temperature, top_p, top_k)
    folder = resolve(model if model is not None else _pico())
    tokenizer = _tokenizer(folder)
    ids = _encode(tokenizer, _prompt(prompt, model), chat)
    needed = ids.shape[1] + max_new_tokens
    if context is not None and context < needed:
        raise ContextExceededError(f"prompt and new tokens need --context {needed}, not {context}; raise it")
    budgets: dict[str, Any] = {"hbm": hbm, "dram": dram, "context": context or needed, "logits": 1}
    options: dict[str, Any] = {"precision": precision, "store": store, "device": device, "checks": checks}
    with tiercache.offload(folder, **budgets, **options, show_progress=_progress(as_json, quiet)) as lent:
        _say(summary.outlook(lent, precision), quiet)
        tokens = _generate(lent, tokenizer, ids, sampling, max_new_tokens, seed, stream=not as_json)
        attached: Any = lent.tiercache
        stats, plan = attached.stats().to_dict(), attached.plan.to_dict()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    result = {"schema": "tiercache.run/1", "text": text, "prompt_tokens": ids.shape[1], "tokens": tokens}
    _tell(summary.of_run(stats, len(tokens)), {**result, "stats": stats, "plan": plan}, as_json, quiet)


def _pico() -> Path:
    if not PICO.is_dir():
        raise UsageError(f"the bundled model is not here ({PICO}); name one: tiercache run MODEL --prompt TEXT")
    return PICO


def _prompt(given: str | None, model: str | None) -> str:
    if given == "-":
        return sys.stdin.read()
    if given is None and model is not None:
        raise UsageError("there is no prompt; give one with --prompt TEXT, or --prompt - for standard input")
    return PICO_PROMPT if given is None else given


def _sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Arguments of `generate`; None keeps what the checkpoint suggests for sampling out of a greedy run."""
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is no share of probability; give one above 0 and at most 1")
    if temperature == 0:
        if top_p != 1 or top_k:
            raise UsageError("--top-p and --top-k do nothing at --temperature 0; give a temperature, such as 0.8")
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def _tokenizer(folder: Path) -> Any:
    import transformers

    if not (folder / "config.json").is_file():
        raise StoreError(f"{folder} has no config.json, so it is neither checkpoint nor plane store; name one's folder")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(f"no tokenizer can be read from {folder}; put its files there ({reason})") from error


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Ids of the prompt. [1, tokens]"""
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise UsageError("--chat needs a chat template, which this model's tokenizer has none of; leave --chat out")
    else:
        talk = [{"role": "user", "content": prompt}]
        template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(talk, **template)["input_ids"]
    if not ids.shape[1]:
        raise UsageError("the prompt holds no token to start from; give some text with --prompt")
    return ids


def _generate(
    model: Any, tokenizer: Any, ids: Any, sampling: dict[str, Any], max_new_tokens: int, seed: int, *, stream: bool
) -> list[int]:
    """The new tokens; their text goes to standard output as it comes, if `stream`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    ids = ids.to(model.tiercache.stats().device)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    mask = torch.ones_like(ids)
    options = {**sampling, "max_new_tokens": max_new_tokens, "pad_token_id": padding}
    output = model.generate(ids, attention_mask=mask, streamer=streamer, **options)
    return cast("list[int]", output[0, ids.shape[1] :].tolist())


@app.command("bench")
def bench_command(
    ctx: typer.Context,
    shape: Annotated[str, typer.Option(help="A model's shape, such as tiny or llama-2-7b.")] = "tinyllama-1.1b",
    precision: Precision = "source",
    hbm: Annotated[str | None, typer.Option(help="Budget of the fastest tier; none by default.")] = None,
    dram: Annotated[str, typer.Option(help="Budget of main memory.")] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Single-token passes to time.")] = 8,
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path("tiercache-bench"),
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
    place: dict[str, Any] = {"folder": folder.expanduser(), "seed": seed, "keep": keep}
    result = shapes.bench(shape, **options, **place, show_progress=_progress(as_json, quiet))
    _tell(shapes.report(result), result, as_json=True, quiet=quiet)  # a benchmark always ends with its line


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

    options = kernels.Options(**kernels.parse(*lists), seed=seed, show_progress=_progress(as_json, quiet))
    result = kernels.bench(options)
    _tell(kernels_report.report(result), result, as_json=True, quiet=quiet)


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
        _console().print(doctor.table(checks))
    _tell("", doctor.to_dict(checks), as_json, quiet=True)
    if not doctor.works(checks):
        raise typer.Exit(_ENVIRONMENT)


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def _progress(as_json: bool, quiet: bool) -> bool | None:
    """Whether to draw bars; None leaves it to whether anybody watches."""
    return False if as_json or quiet else None


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _tell(text: str, plain: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """A result: for people, and for programs where it is wanted."""
    _say(text, quiet)
    if as_json:
        print(json.dumps(plain), flush=True)


def _failed(error: BaseException, message: str, exit_code: int, as_json: bool, debug: bool) -> typer.Exit:
    """Tell of an error; the way out of the program with its code."""
    if debug:
        traceback.print_exception(error)
    _console().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    _print_error(error, message, exit_code, as_json)
    return typer.Exit(exit_code)


def _print_error(error: BaseException, message: str, exit_code: int, as_json: bool) -> None:
    plain = {"schema": "tiercache.error/1", "error": type(error).__name__, "message": message, "exit_code": exit_code}
    plain |= {"missing_bytes": error.missing_bytes} if isinstance(error, DoesNotFitError) else {}
    _tell("", plain, as_json, quiet=True)
