"""Options of the commands that write text, and what `offload` is asked for by them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands.base import memory_option, say
from tiercache.errors import StoreError, UsageError

_NODES = 64  # of a tree of drafts, where nothing is said

# Options by what they are for, as `--help` shows them.
_mixed = partial(typer.Option, rich_help_panel="Mixed mode")
_drafts = partial(typer.Option, rich_help_panel="Drafting")
_samples = partial(typer.Option, rich_help_panel="Sampling")
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Precision = Annotated[str | None, typer.Option(help="source (the original weights), int8, int4 or int3.")]
ComputeDtype = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16: what the model computes in.")]
Checks = Annotated[bool, typer.Option("--checks", help="Verify the store's checksums first.")]
CpuTokens = Annotated[int | None, memory_option(min=0, help="Passes that the CPU multiplies in DRAM.")]
Context = Annotated[int | None, memory_option(min=1, help="Tokens of KV cache; by default what is needed.")]
ChatContext = Annotated[int, memory_option(min=1, help="Tokens of the whole conversation.")]
Mode = Annotated[str, _mixed(help="exact, or mixed: planes per neuron and token; lossy.")]
BytesPerToken = Annotated[
    str | None,
    _mixed(help="What a token may read of the neurons: a share of int8's, 0.5, or 1.2GB."),
]
MaxLoss = Annotated[float | None, _mixed(help="A bound of the calibrated loss, nats a token.")]
Policy = Annotated[str, _mixed(help="Eviction policy of neurons in HBM: lru, sieve, ...; auto replays.")]
MaxFetches = Annotated[int | None, _mixed(min=0, help="Neurons to bring up per token and plane.")]
Plan = Annotated[str, memory_option(help="auto, default (rules of thumb), or a file of tiercache-profile plan.")]
ForcePlan = Annotated[bool, memory_option("--force-plan", help="Take a plan of another machine.")]
Uploads = Annotated[int | None, typer.Option(min=0, hidden=True)]  # the deprecated name of max_fetches
Drafter = Annotated[str, _drafts(help="auto, resident, ngram, lookup, ..., a small model's folder, or none.")]
DraftNodes = Annotated[int | None, _drafts(min=1, help="Of a tree of drafts at most; 64 by default.")]
DraftDepth = Annotated[int | None, _drafts(min=1, help="Of a tree of drafts at most; 16 by default.")]
Temperature = Annotated[float, _samples(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, _samples(help="Sample among the likeliest tokens of this total probability.")]
TopK = Annotated[int, _samples(min=0, help="Sample among that many tokens; 0 for all.")]
Seed = Annotated[int, _samples(help="Of the sampling.")]

# Options that `offload` calls alike, and takes as they are.
_OF_OFFLOAD = (
    *("hbm", "dram", "link_gbps", "cpu_tokens", "store", "device", "checks", "precision", "compute_dtype"),
    *("mode", "bytes_per_token", "max_loss", "policy", "max_fetches", "plan", "force_plan"),
)


def offload_options(given: Mapping[str, Any], context: int | None, logits: int | None) -> dict[str, Any]:
    """What `offload` is asked for. A file of a plan says itself for how many tokens it was made.

    Args:
        given: the command's parameters, by name.
        context: tokens of KV cache; None leaves it to `offload`.
        logits: rows that a pass returns beside those of drafts; None leaves it to `offload`.

    Raises:
        UsageError: options that contradict one another.
    """
    found = {name: given[name] for name in _OF_OFFLOAD}
    found |= _drafting(given["drafter"], given["draft_nodes"], given["draft_depth"])
    if given["plan"] in ("auto", "default"):
        found |= {} if logits is None else {"logits": max(logits, found.get("draft_nodes", 0) + 1)}
        found |= {} if context is None else {"context": context}
    if (uploads := given.get("uploads")) is not None:
        if given["max_fetches"] is not None:
            raise UsageError("--uploads is the deprecated name of --max-fetches; leave it out")
        say("deprecated; write: --max-fetches", given["quiet"])
        found["max_fetches"] = uploads
    return found


def sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are chosen, as a `GenerationRequest` takes it.

    Raises:
        UsageError: options that mean nothing.
    """
    temperature, top_p, top_k = (given[name] for name in ("temperature", "top_p", "top_k"))
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is no share of probability; give one above 0 and at most 1")
    if temperature == 0 and (top_p != 1 or top_k):
        raise UsageError("--top-p and --top-k do nothing at --temperature 0; give a temperature, such as 0.8")
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k}


def tokenizer_of(place: Path) -> Any:
    """The tokenizer of what was named.

    Raises:
        StoreError: there is none, or a folder is no model's.
    """
    from tiercache.text import load_tokenizer

    if place.is_dir() and not (place / "config.json").is_file():
        raise StoreError(f"{place} has no config.json, so it is neither checkpoint nor plane store; name one's folder")
    return load_tokenizer(place)


def _drafting(drafter: str, nodes: int | None, depth: int | None) -> dict[str, Any]:
    """Options of drafting; none where nobody drafts."""
    sizes = {name: size for name, size in (("draft_nodes", nodes), ("draft_depth", depth)) if size is not None}
    if drafter != "none":
        return {"drafter": drafter, "draft_nodes": _NODES, **sizes}
    if sizes:
        option = "--" + next(iter(sizes)).replace("_", "-")
        raise UsageError(f"{option} does nothing without a drafter; add --drafter auto, or leave it out")
    return {}
