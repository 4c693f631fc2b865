"""What a person reads of a run of the benchmark of drafters."""

from typing import Any

from tiercache.bench.tables import table

_NUMBERS = ("nodes", "verified", "tokens/pass", "tokens/s", "plain", "speed-up", "first s", "texts that differ")


def report(result: dict[str, Any]) -> str:
    """Hardware and settings, and a table for each model and temperature."""
    hardware = result["hardware"]
    gpu = f", {hardware['gpu']}" if hardware["gpu"] else ""
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads{gpu}; torch "
        f"{result['torch']}; seeds {', '.join(map(str, result['seeds']))}, {result['prompts']} prompts each of "
        f"{result['prompt_tokens']} tokens; {result['tokens']} tokens written ({result['plain_tokens']} plainly), "
        f"speeds of those after the first; repeats {result['repeats']}"
    ]
    pairs = list(zip(result["rows"], result["details"], strict=True))
    for model in result["models"]:
        own = [(row, more) for row, more in pairs if row["setting"] == model["setting"]]
        lines.append(f"{model['setting']}; prompts from {model['prompts']}")
        for temperature in dict.fromkeys(row["temperature"] for row, _ in own):
            lines += _table([pair for pair in own if pair[0]["temperature"] == temperature], temperature)
        lines += _left_out([each for each in result["left_out"] if each["setting"] == model["setting"]])
    return "\n".join(lines)


def _table(pairs: list[tuple[dict[str, Any], dict[str, Any]]], temperature: float) -> list[str]:
    rows = [
        [
            *(row["drafter"], row["grower"], str(row["nodes"]), f"{more['nodes_per_pass']:.1f}"),
            *(f"{row['tokens_per_pass']:.2f}", f"{row['tokens_per_s']:.2f}", f"{row['plain_tokens_per_s']:.2f}"),
            *(f"{more['speed_up']:.2f} x", f"{more['first_token_s']:.3f}", _verdict(more)),
        ]
        for row, more in pairs
    ]
    return table(f"temperature {temperature:g}", ("drafter", "grower"), _NUMBERS, rows)


def _verdict(more: dict[str, Any]) -> str:
    text = f"{more['texts_that_differ']} of {more['texts_checked']}"
    if more["near_ties"] or more["no_ties"]:
        text += f" ({more['near_ties']} at near ties, {more['no_ties']} not)"
    return text


def _left_out(ways: list[dict[str, Any]]) -> list[str]:
    """Those that one reason holds for together, since the reasons are long."""
    found: dict[str, list[str]] = {}
    for way in ways:
        nodes = "auto" if way["nodes"] is None else way["nodes"]
        found.setdefault(way["reason"], []).append(
            f"{way['drafter']} ({way['grower']}) with {nodes} nodes at temperature {way['temperature']:g}"
        )
    return [f"  left out: {', '.join(those)}: {reason}" for reason, those in found.items()]
