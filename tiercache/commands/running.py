"""`run`: text from a model."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from tiercache.commands import summary
from tiercache.commands.base import (
    Device,
    Dram,
    Hbm,
    Json,
    LinkGbps,
    Quiet,
    StoreFolder,
    app,
    memory_option,
    progress,
    say,
    tell,
)
from tiercache.errors import ContextExceededError, StoreError, UsageError

PICO = Path(__file__).parents[2] / "examples" / "pico" / "checkpoint"
PICO_PROMPT = "def read_lines(path):\n"
_NODES = 64  # of a tree of drafts, where nothing is said


# Options by what they are for, as `--help` shows them.
_mixed = partial(typer.Option, rich_help_panel="Mixed mode")
_drafts = partial(typer.Option, rich_help_panel="Drafting")
_samples = partial(typer.Option, rich_help_panel="Sampling")
_Precision = Annotated[str | None, typer.Option(help="source (the original weights), int8, int4 or int3.")]
_Checks = Annotated[bool, typer.Option("--checks", help="Verify the store's checksums first.")]
_CpuTokens = Annotated[int | None, memory_option(min=0, help="Passes that the CPU multiplies in DRAM.")]
_Context = Annotated[int | None, memory_option(min=1, help="Tokens of KV cache; by default what is needed.")]
_Mode = Annotated[str, _mixed(help="exact, or mixed: planes per neuron and token; lossy.")]
_BytesPerToken = Annotated[
    str | None,
    _mixed(help="What a token may read of the neurons: a share of int8's, 0.5, or 1.2GB."),
]
_MaxLoss = Annotated[float | None, _mixed(help="A bound of the calibrated loss, nats a token.")]
_Policy = Annotated[str, _mixed(help="Eviction policy of neurons in HBM: lru, sieve, ...; auto replays.")]
_MaxFetches = Annotated[int | None, _mixed(min=0, help="Neurons to bring up per token and plane.")]
_Plan = Annotated[str, memory_option(help="auto, default (rules of thumb), or a file of tiercache-profile plan.")]
_ForcePlan = Annotated[bool, memory_option("--force-plan", help="Take a plan of another machine.")]
_Uploads = Annotated[int | None, typer.Option(min=0, hidden=True)]  # the deprecated name of max_fetches
_Drafter = Annotated[str, _drafts(help="auto, resident, ngram, lookup, ..., a small model's folder, or none.")]
_DraftNodes = Annotated[int | None, _drafts(min=1, help="Of a tree of drafts at most; 64 by default.")]
_DraftDepth = Annotated[int | None, _drafts(min=1, help="Of a tree of drafts at most; 16 by default.")]
_Temperature = Annotated[float, _samples(min=0.0, help="0 takes the likeliest token.")]
_TopP = Annotated[float, _samples(help="Sample among the likeliest tokens of this total probability.")]
_TopK = Annotated[int, _samples(min=0, help="Sample among that many tokens; 0 for all.")]
_Seed = Annotated[int, _samples(help="Of the sampling.")]

# Options that `offload` calls alike, and takes as they are.
_OF_OFFLOAD = (
    *("hbm", "dram", "link_gbps", "cpu_tokens", "store", "device", "checks"),
    *("mode", "bytes_per_token", "max_loss", "policy", "max_fetches", "plan", "force_plan"),
)


@app.command("run")
def run_command(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A checkpoint or store; by default the bundled pico.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to continue; - reads standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    precision: _Precision = None,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    link_gbps: LinkGbps = None,
    cpu_tokens: _CpuTokens = None,
    context: _Context = None,
    mode: _Mode = "exact",
    bytes_per_token: _BytesPerToken = None,
    max_loss: _MaxLoss = None,
    policy: _Policy = "auto",
    max_fetches: _MaxFetches = None,
    uploads: _Uploads = None,
    plan: _Plan = "auto",
    force_plan: _ForcePlan = False,
    drafter: _Drafter = "none",
    draft_nodes: _DraftNodes = None,
    draft_depth: _DraftDepth = None,
    store: StoreFolder = None,
    device: Device = "auto",
    checks: _Checks = False,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    seed: _Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text. It streams to standard output; with --json one object comes at the end instead."""
    import torch

    import tiercache
    from tiercache.bench.energy_meter import EnergyMeter
    from tiercache.store.checkpoint import resolve

    sampling = _sampling(temperature, top_p, top_k)
    folder = resolve(model if model is not None else _pico())
    tokenizer = _tokenizer(folder)
    ids = _encode(tokenizer, _prompt(prompt, model), chat)
    options = {name: ctx.params[name] for name in _OF_OFFLOAD} | _drafting(drafter, draft_nodes, draft_depth)
    options["precision"] = precision
    if plan in ("auto", "default"):  # a file says itself for how many tokens it was made
        options |= _room(ids.shape[1] + max_new_tokens, context, options.get("draft_nodes", 0))
    if uploads is not None:
        if max_fetches is not None:
            raise UsageError("--uploads is the deprecated name of --max-fetches; leave it out")
        say("deprecated; write: --max-fetches", quiet)
        options["max_fetches"] = uploads
    with tiercache.offload(folder, **options, show_progress=progress(as_json, quiet)) as opened:
        attached: Any = opened.tiercache
        say(summary.outlook(opened), quiet)
        with EnergyMeter(torch.device(attached.stats().device)) as meter:
            tokens = _generate(opened, tokenizer, ids, sampling, max_new_tokens, seed, stream=not as_json)
        stats, done = attached.stats().to_dict(), attached.run_plan.to_dict()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    result = {"schema": "tiercache.run/1", "text": text, "prompt_tokens": ids.shape[1], "tokens": tokens}
    energy = meter.of_tokens(len(tokens))
    told = "\n".join([summary.of_run(stats, len(tokens)), *summary.of_energy(energy)])
    tell(told, {**result, "stats": stats, "plan": done, "energy": energy}, as_json, quiet)


def _room(needed: int, context: int | None, draft_nodes: int) -> dict[str, Any]:
    """Tokens of the KV cache, and rows of logits that a pass returns at most."""
    if context is not None and context < needed:
        raise ContextExceededError(f"prompt and new tokens need --context {needed}, not {context}; raise it")
    return {"context": context or needed, "logits": draft_nodes + 1}


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


def _drafting(drafter: str, nodes: int | None, depth: int | None) -> dict[str, Any]:
    """Options of drafting; none where nobody drafts."""
    sizes = {name: size for name, size in (("draft_nodes", nodes), ("draft_depth", depth)) if size is not None}
    if drafter != "none":
        return {"drafter": drafter, "draft_nodes": _NODES, **sizes}
    if sizes:
        option = "--" + next(iter(sizes)).replace("_", "-")
        raise UsageError(f"{option} does nothing without a drafter; add --drafter auto, or leave it out")
    return {}


def _tokenizer(folder: Path) -> Any:
    from tiercache.text import load_tokenizer

    if not (folder / "config.json").is_file():
        raise StoreError(f"{folder} has no config.json, so it is neither checkpoint nor plane store; name one's folder")
    return load_tokenizer(folder)


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
