"""Where the seconds of a pass go: by kind of layer and by resource, and what of them is not hidden behind another.

Knows the cost model's numbers; neither models nor people.
"""

from collections.abc import Mapping
from dataclasses import replace

from policies.plan import Plan
from profiler.cost_model import PassTime, pass_time
from profiler.hardware import Hardware
from profiler.workload import Workload

KV_CACHE, REST = "KV cache", "other"
# Parts of the names of units, which are the model's own names of its modules.
_KINDS = {
    "attention": ("attn", "attention"),
    "feed-forward": ("mlp", "feed_forward", "ffn", ".fc", "dense_h_to_4h", "dense_4h_to_h"),
    "head": ("lm_head", "embed", "wte"),
}
# Resources that follow one another: a layer's products, wherever they are made, and what it costs beside them.
SERIAL = ("compute", "cpu", "overhead")


def kind_of(unit: str) -> str:
    """The kind of layer that a unit of this name belongs to."""
    return next((kind for kind, parts in _KINDS.items() if any(part in unit for part in parts)), REST)


def busy_by_kind(
    workload: Workload, plan: Plan, hardware: Hardware, *, tokens: int = 1, past: int = 0, cpu_tokens: int = 0
) -> dict[str, dict[str, float]]:
    """Of each kind of layer the seconds that each resource is busy for it in one pass; arguments as of `pass_time`.

    A kind's seconds are those of the whole pass less those of a pass without it, so that they are the cost model's own.
    "KV cache" is attention over it, without matrices. What copies cost beside their bytes is no kind's.
    """

    def busy(of: Workload) -> Mapping[str, float]:
        return pass_time(of, plan, hardware, tokens=tokens, past=past, cpu_tokens=cpu_tokens).busy_s

    whole, names = busy(workload), workload.needs.names
    kinds = {key: kind_of(names[key]) for key in workload.payload}
    found = {}
    for kind in dict.fromkeys(kinds[key] for key in workload.needs.order):
        rest = replace(
            workload,
            matmuls=tuple(matmul for matmul in workload.matmuls if kinds[matmul.units[0]] != kind),
            payload={key: 0 if kinds[key] == kind else nbytes for key, nbytes in workload.payload.items()},
            reads={key: () if kinds[key] == kind else reads for key, reads in workload.reads.items()},
        )
        found[kind] = _less(whole, busy(rest))
    found[KV_CACHE] = _less(whole, busy(replace(workload, kv_bytes=0, attention_width=0)))
    return {kind: seconds for kind, seconds in found.items() if any(seconds.values())}


def exposed_s(time: PassTime, overlap: float) -> dict[str, float]:
    """What each resource adds to a pass; the sum is the pass.

    Args:
        time: of the pass.
        overlap: which share of what could run at once does. The rest of what does not bind is added in full.
    """
    busy = {**time.busy_s, "overhead": time.overhead_s}
    serial = sum(busy[name] for name in SERIAL)
    others = {name: seconds for name, seconds in busy.items() if name not in SERIAL}
    longest = max(others, key=lambda name: others[name], default="")
    binding = SERIAL if serial >= others.get(longest, 0.0) else (longest,)
    # Traffic of main memory is no work of its own: it only limits the copies and reads that make it.
    found = {name: 0.0 if name == "dram" else (1 - overlap) * seconds for name, seconds in busy.items()}
    left = time.total_s - sum(seconds for name, seconds in found.items() if name not in binding)
    whole = sum(busy[name] for name in binding)
    return found | {name: left * busy[name] / whole if whole else 0.0 for name in binding}


def _less(whole: Mapping[str, float], rest: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, seconds - rest[name]) for name, seconds in whole.items()}
