"""`serve`: a model behind OpenAI's API."""

from contextlib import closing
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from tiercache.commands import running, summary
from tiercache.commands.base import Device, Dram, Hbm, Json, LinkGbps, Quiet, StoreFolder, app, progress, say, tell
from tiercache.errors import EnvironmentUnsupportedError


@app.command("serve")
def serve_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint, store or Hub id.", show_default=False)],
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
    logits: Annotated[int | None, typer.Option(min=1, help="Tokens that a pass scores for echo; 512.")] = None,
    precision: running._Precision = None,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    link_gbps: LinkGbps = None,
    cpu_tokens: running._CpuTokens = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer at most; 4096.")] = None,
    mode: running._Mode = "exact",
    bytes_per_token: running._BytesPerToken = None,
    max_loss: running._MaxLoss = None,
    policy: running._Policy = "auto",
    max_fetches: running._MaxFetches = None,
    plan: running._Plan = "auto",
    force_plan: running._ForcePlan = False,
    drafter: running._Drafter = "none",
    draft_nodes: running._DraftNodes = None,
    draft_depth: running._DraftDepth = None,
    store: StoreFolder = None,
    device: Device = "auto",
    checks: running._Checks = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a model by OpenAI's API, with a chat at `/`. The key of its clients is in $TIERCACHE_API_KEY.

    With --json one object tells where it listens. SIGTERM ends it with exit code 0, Ctrl-C with 130.
    """
    try:
        from tiercache.serve.front import Front, Limits
    except ImportError as error:
        raise EnvironmentUnsupportedError(
            f"serving needs packages that are not installed ({error.name}); install them: pip install "
            "'tiercache[serve]'"
        ) from error
    import tiercache
    from tiercache.store.checkpoint import resolve
    from tiercache.text import load_tokenizer

    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    options = {option: ctx.params[option] for option in running._OF_OFFLOAD}
    options |= running._drafting(drafter, draft_nodes, draft_depth) | {"precision": precision}
    options |= {option: ctx.params[option] for option in ("context", "logits") if ctx.params[option] is not None}
    called = name or _name(model, folder)

    def log(method: str, path: str, status: int, seconds: float) -> None:
        say(f"{method} {quote(path)[:80]} {status} {seconds:.2f} s", quiet)

    with closing(Front(host, port, tuple(allow_host or ()))) as front:

        def ready() -> None:
            plain = {"schema": "tiercache.serve/1", "url": front.url, "model": called}
            tell(f"{called} is served at {front.url} (Ctrl-C ends it)", plain, as_json, quiet)

        with tiercache.offload(folder, **options, show_progress=progress(as_json, quiet)) as opened:
            say(summary.outlook(opened), quiet)
            front.serve(opened, tokenizer, called, Limits(waiting, max_tokens, max_body), ready=ready, log=log)


def _name(model: str, folder: Path) -> str:
    """A Hub id as it is; of a folder or file its last part."""
    return folder.resolve().name if Path(model).expanduser().exists() else model
