"""The tables of `make real`, as Markdown, so that they can be put into docs/measured.md as they are."""

from collections.abc import Sequence
from typing import Any

_DEPTHS = 4  # that acceptance is told of


def quality(name: str, result: dict[str, Any]) -> str:
    """What each mode loses on a text, and its speed."""
    rows = [
        (
            row["mode"],
            f"{row['bytes_per_token'] / 1e6:.1f} MB",
            _number(row["perplexity"], ".2f"),
            _number(row["kl"], ".4f"),
            f"{row['top1']:.1%}",
            _number(row["tokens_per_s"], ".1f"),
        )
        for row in result["rows"]
    ]
    title = f"Held-out {name}, {result['predicted']} tokens, windows of {result['window']}"
    return _table(title, ("mode", "read a token", "perplexity", "KL, nats", "same top token", "tokens/s"), rows)


def llamacpp(found: dict[str, Any]) -> str:
    """One line."""
    if "left_out" in found:
        return f"llama.cpp: {found['left_out']}"
    return (
        f"llama.cpp (llama-cpp-python {found['version']}, Q4_1, repacked, {found['threads']} threads): "
        f"{found['tokens_per_s']:.1f} tokens/s, prompts at {found['prefill_tokens_per_s']:.0f} tokens/s"
    )


def drafters(rows: Sequence[dict[str, Any]], peer: dict[str, Any]) -> str:
    """Every way of decoding, by place and temperature, and llama.cpp below."""
    told = []
    for row in rows:
        lead = (row["place"], f"{row['temperature']:g}", row["drafter"])
        if "refused" in row:
            told.append((*lead, "refused: " + row["refused"].partition(":")[0], "", "", "", "", ""))
            continue
        depths = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_depth"][:_DEPTHS]) or "-"
        rates = (f"{row['tokens_per_s']:.1f}", f"{row['speed_up']:.2f} x")
        streamed = f"{row['streamed_bytes'] / 1e6:.0f} MB"
        same = (
            row["same_texts"] if row["temperature"] == 0 else "-"
        )  # sampled texts are others: another stream of noise
        told.append((*lead, streamed, f"{row['tokens_per_pass']:.2f}", depths, *rates, same))
    if "tokens_per_s" in peer:
        told.append(
            ("llama.cpp, Q4_1, all in DRAM", "0", "-", "-", "1.00", "-", f"{peer['tokens_per_s']:.1f}", "-", "-")
        )
    heads = ("int8 target", "T", "drafter", "streamed a pass", "tokens a pass", "accepted by depth")
    return _table("Drafters over the instructions", (*heads, "tokens/s", "against plain", "same texts"), told)


def _number(value: float | None, how: str) -> str:
    return "not finite" if value is None else format(value, how)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
