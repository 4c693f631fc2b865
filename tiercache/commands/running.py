"""`run`: text from a model."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands import run_options, summary
from tiercache.commands.base import (
    INTERRUPTED,
    Device,
    Dram,
    Hbm,
    Json,
    LinkGbps,
    Quiet,
    StoreFolder,
    app,
    begin,
    progress,
    say,
    tell,
)
from tiercache.errors import ContextExceededError, UsageError
from tiercache.progress import COMMAND_PROGRESS

PICO = Path(__file__).parents[2] / "examples" / "pico" / "checkpoint"
PICO_PROMPT = "def read_lines(path):\n"

_Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template: done where there is one.")]
_Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")]


@app.command("run")
def run_command(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A checkpoint, GGUF file, store or Hub id; else the toy.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to continue; - reads standard input.")] = None,
    chat: _Chat = False,
    raw: _Raw = False,
    max_new_tokens: run_options.MaxNewTokens = 64,
    precision: run_options.Precision = None,
    compute_dtype: run_options.ComputeDtype = "auto",
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    link_gbps: LinkGbps = None,
    cpu_tokens: run_options.CpuTokens = None,
    context: run_options.Context = None,
    mode: run_options.Mode = "exact",
    bytes_per_token: run_options.BytesPerToken = None,
    max_loss: run_options.MaxLoss = None,
    policy: run_options.Policy = "auto",
    max_fetches: run_options.MaxFetches = None,
    uploads: run_options.Uploads = None,
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
    """Generate text. It streams to standard output; with --json one object comes at the end instead."""
    if chat and raw:
        raise UsageError("--chat and --raw contradict each other; leave one of them out")
    sampling, text = run_options.sampling(ctx.params), _prompt(prompt, model)
    begin("opening the model", as_json, quiet)
    import torch

    import tiercache
    from tiercache.bench.energy_meter import EnergyMeter
    from tiercache.commands.answering import Speaker
    from tiercache.commands.interrupts import Interrupts
    from tiercache.generation.request import GenerationRequest
    from tiercache.store.checkpoint import resolve

    place, show = resolve(model if model is not None else _pico()), progress(as_json, quiet)
    tokenizer = run_options.tokenizer_of(place)
    ids, how = _encode(tokenizer, text, chat=chat, raw=raw)
    request = GenerationRequest(ids, max_new_tokens, seed=seed, **sampling)
    options = run_options.offload_options(ctx.params, _context(len(ids) + max_new_tokens, context), logits=1)
    with tiercache.offload(place, **options, show_progress=show) as opened, Interrupts() as interrupts:
        attached: Any = opened.tiercache
        COMMAND_PROGRESS.stop()
        say(f"{summary.outlook(opened)}; {how}", quiet)
        speaker = Speaker(opened, tokenizer, stream=not as_json, show=show)
        with EnergyMeter(torch.device(attached.stats().device)) as meter:
            told = speaker.answer(request, interrupts)
        stats, done = attached.stats().to_dict(), attached.run_plan.to_dict()
    answer = told.answer
    result: dict[str, Any] = {"schema": "tiercache.run/1", "text": answer.text, "finish_reason": answer.finish_reason}
    result |= {"prompt_tokens": len(ids), "tokens": list(answer.tokens), **told.figures}
    energy = meter.of_tokens(len(answer.tokens))
    lines = [summary.of_run(stats, len(answer.tokens)), *summary.of_bytes(told.figures), *summary.of_energy(energy)]
    lines += ["interrupted: this is what was written until then"] if told.cancelled else []
    tell("\n".join(lines), {**result, "stats": stats, "plan": done, "energy": energy}, as_json, quiet)
    if told.cancelled:
        raise typer.Exit(INTERRUPTED)


def _context(needed: int, context: int | None) -> int:
    """Tokens of the KV cache."""
    if context is not None and context < needed:
        raise ContextExceededError(f"prompt and new tokens need --context {needed}, not {context}; raise it")
    return context or needed


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


def _encode(tokenizer: Any, prompt: str, *, chat: bool, raw: bool) -> tuple[tuple[int, ...], str]:
    """Ids of the prompt, and how they were made, for people."""
    from tiercache.generation.chat_template import templated

    if chat and tokenizer.chat_template is None:
        raise UsageError("--chat needs a chat template, which this model's tokenizer has none of; leave --chat out")
    if tokenizer.chat_template is not None and not raw:
        ids, how = templated(tokenizer, [{"role": "user", "content": prompt}]), "prompt in the chat template"
        return ids, how if chat else f"{how} (--raw for none)"
    ids = tuple(tokenizer(prompt)["input_ids"])
    if not ids:
        raise UsageError("the prompt holds no token to start from; give some text with --prompt")
    return ids, "prompt as it is" if raw else "prompt as it is, for the tokenizer has no chat template"
