"""`chat`: a conversation at the terminal, or one line a turn from a pipe."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from tiercache.commands import run_options, summary
from tiercache.commands.base import (
    Device,
    Dram,
    Hbm,
    Json,
    LinkGbps,
    Quiet,
    StoreFolder,
    app,
    begin,
    console,
    progress,
    say,
)
from tiercache.progress import COMMAND_PROGRESS

_HELP = """/reset   forget the conversation and begin anew
/stats   what was read, hit and written so far
/help    these lines
/exit    end; so does Ctrl-D. Ctrl-C stops an answer, and at the prompt it ends the program
A line that begins with a space is sent as it is."""
_System = Annotated[str | None, typer.Option(help="What the model is told before everything else.")]


@app.command("chat")
def chat_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint, GGUF file, store or Hub id.", show_default=False)],
    system: _System = None,
    max_new_tokens: run_options.MaxNewTokens = 512,
    precision: run_options.Precision = None,
    compute_dtype: run_options.ComputeDtype = "auto",
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    link_gbps: LinkGbps = None,
    cpu_tokens: run_options.CpuTokens = None,
    context: run_options.ChatContext = 4096,
    mode: run_options.Mode = "exact",
    bytes_per_token: run_options.BytesPerToken = None,
    max_loss: run_options.MaxLoss = None,
    policy: run_options.Policy = "auto",
    max_fetches: run_options.MaxFetches = None,
    plan: run_options.Plan = "auto",
    force_plan: run_options.ForcePlan = False,
    drafter: run_options.Drafter = "none",
    draft_nodes: run_options.DraftNodes = None,
    draft_depth: run_options.DraftDepth = None,
    store: StoreFolder = None,
    device: Device = "auto",
    checks: run_options.Checks = False,
    temperature: run_options.Temperature = 0.0,
    top_p: run_options.TopP = 1.0,
    top_k: run_options.TopK = 0,
    seed: run_options.Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model. Answers stream to standard output; with --json each turn is one object there."""
    sampling = run_options.sampling(ctx.params)
    begin("opening the model", as_json, quiet)
    import tiercache
    from tiercache import text as texts
    from tiercache.commands.answering import Speaker
    from tiercache.commands.conversation import Conversation
    from tiercache.commands.turns import Turns
    from tiercache.store.checkpoint import resolve

    place, show = resolve(model), progress(as_json, quiet)
    tokenizer = run_options.tokenizer_of(place)
    conversation = Conversation(tokenizer, system)
    options = run_options.offload_options(ctx.params, context, logits=1)
    with tiercache.offload(place, **options, show_progress=show) as opened:
        COMMAND_PROGRESS.stop()
        say(summary.outlook(opened), quiet)
        say("/help lists commands; /exit or Ctrl-D ends", quiet or not sys.stdin.isatty())
        speaker = Speaker(opened, tokenizer, stream=not as_json, show=show)
        asked, positions = {**sampling, "max_new_tokens": max_new_tokens}, texts.positions(opened.config)
        turns = Turns(speaker, conversation, asked, seed, positions)
        for line in _lines(as_json):
            if line.startswith("/"):
                if _obeyed(line, turns, opened, as_json):
                    return
            elif line.strip():
                _turn(line.strip(), turns, as_json, quiet)


def _lines(as_json: bool) -> Iterator[str]:
    """What is typed or piped in, a line each. Ctrl-C at the prompt is the program's end."""
    read = _reader(as_json)
    while (line := read()) is not None:
        yield line.rstrip("\n")


def _reader(as_json: bool) -> Callable[[], str | None]:
    """Reads a line; None at the end. On a terminal there is a prompt, and editing where readline is."""
    if not sys.stdin.isatty():
        return lambda: sys.stdin.readline() or None
    if as_json or not sys.stdout.isatty():  # standard output is data's

        def plain() -> str | None:
            print("> ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline() or None

        return plain
    with contextlib.suppress(ImportError):  # not everywhere
        import readline  # noqa: F401 - importing it gives input() line editing

    def edited() -> str | None:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            raise

    return edited


def goes_on() -> bool:
    """Whether there is somebody to say something else; a pipe's other lines would be answered without this one."""
    return sys.stdin.isatty()


def _obeyed(line: str, turns: Any, opened: Any, as_json: bool) -> bool:
    """Do what a command says; whether it ends the conversation."""
    match line.split()[0]:
        case "/exit" | "/quit":
            return True
        case "/reset":
            turns.reset()
            say("the conversation begins anew", quiet=as_json)
        case "/stats":
            stats = opened.tiercache.stats().to_dict()
            say(f"{turns.text()}\n{summary.of_run(stats, turns.tokens)}", quiet=as_json)
            if as_json:
                print(json.dumps(stats), flush=True)
        case "/help":
            say(_HELP, quiet=as_json)
        case other:
            say(f"there is no command {other}; /help lists them, and a space before sends a line as it is", quiet=False)
    return False


def _turn(text: str, turns: Any, as_json: bool, quiet: bool) -> None:
    """One message and its answer. What does not fit the context is refused; a conversation that is typed goes on."""
    from tiercache.errors import ContextExceededError

    try:
        turn, remarks = turns.take(text)
    except ContextExceededError as error:
        if not goes_on():
            raise
        say(str(error), quiet=False)
        return
    if not quiet and not as_json:
        aside = Text("\n".join([*remarks, summary.of_answer(turn)]), style="dim")
        console().print(aside, soft_wrap=not sys.stderr.isatty())
    if as_json:
        print(json.dumps(turn), flush=True)
