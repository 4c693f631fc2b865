"""What a person reads on standard error: a few lines for each kind of result. Takes plain data, prints nothing."""

from typing import Any

from tiercache.config.options import of_planes
from tiercache.config.sizes import human

_DEPTHS = 8  # that acceptance is told of
_TIER_NAMES = {"ssd": "SSD", "link": "link", "dram": "DRAM", "neurons": "neurons"}


def of_dry_run(report: dict[str, Any]) -> str:
    """What a conversion would take."""
    missing = report["store_bytes"] - report["free_bytes"]
    return (
        f"{human(report['source_bytes'])} of weights would make a store of {human(report['store_bytes'])} "
        f"({report['store_bytes']} bytes; less where zstd pays); {human(report['free_bytes'])} are free on its disk"
        f"{f': {human(missing)} ARE MISSING' if missing > 0 else ''}{_calibrating(report)}\n"
        f"{_bits(report['bits'])}{_lost(report)}"
    )


def _bits(bits: dict[str, float]) -> str:
    """Bits a weight, the highest precision first."""
    each = ", ".join(f"{precision} {bits[precision]:.2f}" for precision in sorted(bits, key=lambda name: -bits[name]))
    return f"bits a weight, scales and factors included: {each}"


def _lost(report: dict[str, Any]) -> str:
    """What quantising had cost the weights before; a line of its own."""
    return f"\n{report['loss']}" if report["loss"] else ""


def codes(calibration: dict[str, Any]) -> str:
    """How a store's codes were chosen."""
    if calibration["method"] != "gptq":
        return "rounded"
    tuned = f", tuned in {calibration['tune']} steps" if calibration.get("tune") else ""
    return f"calibrated on {calibration['tokens']} tokens{tuned}"


def _calibrating(report: dict[str, Any]) -> str:
    """What calibrating takes, if codes are calibrated."""
    if not report["calibrating_s"]:
        return ""
    minutes, memory = max(1, round(report["calibrating_s"] / 60)), human(report["calibrating_bytes"])
    done = f", of which {human(report['resumed_bytes'])} are done" if report["resumed_bytes"] else ""
    return (
        f"; calibrating on {report['calibration']['tokens']} tokens takes some {minutes} min in all{done}, and up to "
        f"{memory} of memory beside the process's own"
    )


def of_conversion(report: dict[str, Any]) -> str:
    """What a conversion did."""
    if not report["seconds"]:
        return f"{report['store']} is there already, of the same checkpoint and parameters"
    done = report["source_bytes"] - report["resumed_bytes"]
    used = [name for name, row in (report["compression"] or {}).items() if row["used"]]
    return (
        f"{report['store']}: {human(report['store_bytes'])} from {human(report['source_bytes'])} in "
        f"{report['seconds']:.1f} s ({done / report['seconds'] / 1e6:.1f} MB/s; {human(report['resumed_bytes'])} done "
        f"before; compressed: {', '.join(used) or 'nothing'}); {_bits(report['bits'])}{_lost(report)}"
    )


def of_store(found: dict[str, Any]) -> str:
    """What is in a store."""
    lines = [
        f"{found['folder']}: {found['model_type']}, {found['dtype']}, {found['units']} units, {found['neurons']} "
        f"neurons, groups of {found['group']}, planes of {'+'.join(map(str, found['plane_bits']))} bits, codes "
        f"{codes(found['calibration'])}",
        *(
            f"  a pass at {precision} reads {human(nbytes)}, {found['bits'][precision]:.2f} bits a weight"
            for precision, nbytes in found["pass_bytes"].items()
        ),
    ]
    for name, row in sorted(found["files"].items()):
        packed = "" if row["stored_bytes"] == row["plain_bytes"] else f", {human(row['plain_bytes'])} unpacked"
        lines.append(f"  {name}: {human(row['stored_bytes'])}{packed}, {row['extents']} extents")
    return "\n".join(lines)


def outlook(model: Any) -> str:
    """What is known before the first token."""
    sizes, plan = model.tiercache.pass_bytes(), model.tiercache.plan
    stats = model.tiercache.stats()
    budgets = f"dram {human(plan.dram.capacity_bytes)}"
    if plan.hbm:
        stands_in = " (a region of main memory that stands in for a card's)" if stats.device == "cpu" else ""
        budgets = f"hbm {human(plan.hbm.capacity_bytes)}{stands_in}, {budgets}"
    nature = f"{stats.precision} weights" if of_planes(stats.precision) else "the original weights"
    return (
        f"{model.config.model_type} on {stats.device} in {stats.compute_dtype}, {nature}; {budgets}; each pass needs "
        f"{human(sizes['needed'])}, {human(sizes['ssd'])} of it from the SSD"
    )


def of_run(stats: dict[str, Any], tokens: int) -> str:
    """Where a run's bytes and seconds went."""
    lines = [_tier_summary(name, tier) for name, tier in stats["tiers"].items()]
    direct = "direct" if stats["direct_io"] else "through the page cache"
    lines.append(f"ssd   {human(stats['ssd_bytes'])} read, {direct}")
    device = f", GPU {human(stats['peak_device_bytes'])}" if stats["peak_device_bytes"] else ""
    drafting = stats["drafting"]
    lines.append(
        f"{tokens} tokens: first after {stats['first_pass_s']:.3f} s, then {stats['tokens_per_s']:.2f} tokens/s; "
        f"kernels {stats['kernels']}; peak RSS {human(stats['peak_rss_bytes'])}{device}"
    )
    if stats["predicted_pass_s"] is not None:
        off = stats["predicted_pass_s"] / stats["actual_pass_s"] - 1
        lines.append(
            f"a pass of one token took {1e3 * stats['actual_pass_s']:.1f} ms, predicted were "
            f"{1e3 * stats['predicted_pass_s']:.1f} ({off:+.0%})"
        )
    if (neurons := stats["neurons"]) is not None:
        lines.append(_neuron_summary(neurons))
    if drafting is not None:
        lines.append(_draft_summary(drafting))
    if stats["link"] != "measured":
        lines.append(f"the link was {stats['link']}")
    if stats["lossy"]:
        lines.append("notice: this run was lossy: another text than the weights at this precision would have given")
    return "\n".join(lines)


def of_answer(answer: dict[str, Any]) -> str:
    """What one answer took, in a line."""
    first_s, reused = answer["first_token_s"], answer["reused_tokens"]
    kept = f" ({reused} of them kept from the turn before)" if reused else ""
    waited = "" if first_s is None else f", first after {first_s:.2f} s"
    line = f"{answer['prompt_tokens']} tokens read{kept}, {len(answer['tokens'])} written{waited}"
    if answer["tokens_per_s"] is None:
        return line
    per_pass = answer["tokens_per_pass"]
    drafted = "" if per_pass is None else f", {per_pass:.2f} tokens a pass"
    return "; ".join([f"{line}, then {answer['tokens_per_s']:.2f} tokens/s{drafted}", *of_bytes(answer)])


def of_bytes(figures: dict[str, Any]) -> list[str]:
    """A line of the bytes that each token moved, by tier; none where too few tokens came to tell."""
    if figures["bytes_per_token"] is None:
        return []
    each = ", ".join(f"{_TIER_NAMES[name]} {human(count)}" for name, count in figures["bytes_per_token"].items())
    return [f"a token moved: {each}"]


def of_energy(energy: dict[str, Any] | None) -> list[str]:
    """A line of what counters saw; none where there are no counters."""
    if energy is None:
        return []
    parts = ", ".join(f"{part} {joules:.0f} J" for part, joules in energy["joules"].items())
    return [f"energy, {energy['how']}: {energy['joules_per_token']:.1f} J a token ({parts} in all)"]


def _neuron_summary(neurons: dict[str, Any]) -> str:
    each = neurons["read_bytes"] / max(1, neurons["tokens"])
    text = f"neurons {human(each)} read a token"
    if neurons["hit_rate"] is None:
        return text
    return (
        f"{text}, {human(neurons['moved_bytes'] / max(1, neurons['tokens']))} brought up; policy {neurons['policy']}: "
        f"hit rate {neurons['hit_rate']:.3f}, by chance {neurons['chance']:.3f}"
    )


def _draft_summary(drafting: dict[str, Any]) -> str:
    who, price = " or ".join(drafting["drafters"]) or "nobody", drafting["room_price"]
    if not drafting["rounds"]:
        reasons = ", ".join(drafting["plain_reasons"]) or "nothing was decoded after the first token"
        return f"drafts by {who}: none, for {reasons}"
    rates = " ".join(f"{rate:.2f}" for rate in drafting["acceptance_by_depth"][:_DEPTHS])
    room = f" (with a drafter's memory taken, a plain pass is {price:.2f} x as long)" if price and price > 1 else ""
    faster = "" if drafting["speed_up"] is None else f"; {drafting['speed_up']:.2f} x plain passes{room}"
    return (
        f"drafts by {who}: {drafting['tokens_per_pass']:.2f} tokens a pass of {drafting['rounds']} "
        f"({drafting['plain_rounds']} without a tree), {drafting['accepted']} of {drafting['nodes']} nodes accepted, "
        f"by depth {rates or 'none'}; drafting {drafting['draft_s']:.3f} s, verifying {drafting['verify_s']:.3f} s"
        f"{faster}"
    )


def _tier_summary(name: str, tier: dict[str, Any]) -> str:
    stalls = ", ".join(f"{cause} {seconds:.3f} s" for cause, seconds in tier["stall_s"].items()) or "none"
    return (
        f"{name:<5} peak {human(tier['peak_bytes'])} of {human(tier['capacity_bytes'])}; {tier['hits']} hits, "
        f"{tier['misses']} misses; {human(tier['loaded_bytes'])} brought in; stalls: {stalls}"
    )
