"""`serve`: a model behind OpenAI's API."""

from contextlib import closing
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

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
    memory_option,
    progress,
    say,
    tell,
)
from tiercache.errors import EnvironmentUnsupportedError


@app.command("serve")
def serve_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint, GGUF file, store or Hub id.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; by default the folder's name.")
    ] = None,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get a 429.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="New tokens of an answer at most.")] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request at most.")] = 4 << 20,
    allow_host: Annotated[list[str] | None, typer.Option(help="Further names that requests may use; several.")] = None,
    logits: Annotated[int | None, memory_option(min=1, help="Tokens that a pass scores for echo; 512.")] = None,
    precision: run_options.Precision = None,
    compute_dtype: run_options.ComputeDtype = "auto",
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    link_gbps: LinkGbps = None,
    cpu_tokens: run_options.CpuTokens = None,
    context: Annotated[int | None, memory_option(min=1, help="Tokens of prompt and answer at most; 4096.")] = None,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a model by OpenAI's API, with a chat at `/`. The key of its clients is in $TIERCACHE_API_KEY.

    With --json one object tells where it listens. SIGTERM ends it with exit code 0, Ctrl-C with 130.
    """
    try:
        from tiercache.serve.listener import Limits, Listener
    except ImportError as error:
        raise EnvironmentUnsupportedError(
            f"serving needs packages that are not installed ({error.name}); install them: pip install "
            "'tiercache[serve]'"
        ) from error
    begin("opening the model", as_json, quiet)
    import tiercache
    from tiercache.store.checkpoint import resolve

    folder = resolve(model)
    tokenizer = run_options.tokenizer_of(folder)
    options = run_options.offload_options(ctx.params, context, logits)
    called = name or _name(model, folder)

    def log(method: str, path: str, status: int, seconds: float) -> None:
        say(f"{method} {quote(path)[:80]} {status} {seconds:.2f} s", quiet)

    with closing(Listener(host, port, tuple(allow_host or ()))) as listener:

        def ready() -> None:
            plain = {"schema": "tiercache.serve/1", "url": listener.url, "model": called}
            tell(f"{called} is served at {listener.url} (Ctrl-C ends it)", plain, as_json, quiet)

        with tiercache.offload(folder, **options, show_progress=progress(as_json, quiet)) as opened:
            say(summary.outlook(opened), quiet)
            listener.serve(opened, tokenizer, called, Limits(waiting, max_tokens, max_body), ready=ready, log=log)


def _name(model: str, folder: Path) -> str:
    """A Hub id as it is; of a folder or file its last part."""
    return folder.resolve().name if Path(model).expanduser().exists() else model
