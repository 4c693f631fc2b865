"""What a calibration found, as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from policies.precision import PRECISION_NAMES

_WIDTH = 118
_FEW_BLOCKS = 8  # so many have a column each; of more there is room for the spread alone (--json has them all)
_OF_70B = 80 * 3 * 28672 * 8192  # weights of a 70B's feed-forward blocks


def report(result: Mapping[str, Any]) -> str:
    """The tables of a calibration's result."""
    console = Console(width=_WIDTH, file=None, record=False)
    with console.capture() as captured:
        for table in (_recalls(result), _alike(result), _settings(result), _policies(result)):
            if table is not None:
                console.print(table)
        console.print(_last(result), soft_wrap=True)
    return captured.get()


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _layers(result: Mapping[str, Any]) -> list[str]:
    if result["blocks"] > _FEW_BLOCKS:
        return ["least", "median", "most", "mean"]
    return [*(str(layer) for layer in range(result["blocks"])), "mean"]


def _with_mean(values: Sequence[float | None], shown: str = ".3f") -> list[str]:
    known = sorted(value for value in values if value is not None)
    mean = sum(known) / len(known) if known else None
    told = values
    if len(values) > _FEW_BLOCKS:
        told = [known[0], known[len(known) // 2], known[-1]] if known else [None] * 3
    return ["-" if value is None else format(value, shown) for value in (*told, mean)]


def _recalls(result: Mapping[str, Any]) -> Table:
    table = _table("Recall of the important neurons, over the blocks", ["ranked by", "planes", "of", *_layers(result)])
    for name, ranks in result["recall"].items():
        for rank, halves in ranks.items():
            for half, values in halves.items():
                table.add_row(name, rank, half, *_with_mean(values))
    for name in ("predictor", "ahead"):
        for half, values in result.get(name, {}).items():
            table.add_row(f"{name}, rank {result['predictor_rank']}", "-", half, *_with_mean(values))
    for half, values in result["previous"].items():
        table.add_row("the token before", "-", half, *_with_mean(values))
    for half in result["previous"]:
        table.add_row("chance", "-", half, *_with_mean([int(half[:-1]) / 100] * result["blocks"]))
    return table


def _alike(result: Mapping[str, Any]) -> Table:
    table = _table("Neurons, over the blocks", ["", "of", *_layers(result)])
    for half, windows in result["unions"].items():
        for window, values in windows.items():
            table.add_row(f"wanted by any of {window} tokens", half, *_with_mean(values))
    table.add_row("exactly zero", "-", *_with_mean(result["zeros"]))
    for place, precision in enumerate(("int3", "int4")):
        table.add_row(
            f"loss at {precision}, of the stream", "-", *_with_mean([row[place] for row in result["losses"]], ".1e")
        )
    return table


def _settings(result: Mapping[str, Any]) -> Table:
    columns = ["share of int8's bytes", "ranking", "KiB a token", "neurons", "KL", "perplexity", "entropy", "same top"]
    title = f"Settings, on {result['measured_tokens']} tokens; what is no neuron at {result['precision']}"
    table = _table(title, columns)
    for name, row in result["uniform"].items():
        table.add_row(f"all at {name}", "-", f"{row['read_bytes'] / 1024:.0f}", "", *_numbers(row))
    for row in result["settings"]:
        lead = [f"{row['share']:.3f}", PRECISION_NAMES[row["rank"]], f"{row['read_bytes'] / 1024:.0f}", row["recipe"]]
        table.add_row(*lead, *_numbers(row))
    return table


def _numbers(row: Mapping[str, Any]) -> list[str]:
    shown = {"kl": ".5f", "perplexity": ".4f", "entropy": ".4f", "top1": ".4f"}
    return ["-" if row[name] is None else format(row[name], how) for name, how in shown.items()]


def _policies(result: Mapping[str, Any]) -> Table | None:
    found = result["policies"]
    if found is None:
        return None
    title = (
        f"Policies, on {found['tokens']} tokens at {found['share']:.3f} of the bytes, ranking "
        f"{PRECISION_NAMES[found['rank']]}; slots for {found['slots']:.0%} of the neurons in each plane above"
    )
    columns = ["policy", "hit rate", "chance", "lift", "missed KiB a token", "Belady's bound"]
    table = _table(title, columns)
    for row in found["rows"]:
        rates = [f"{row['hit_rate']:.3f}", f"{row['chance']:.3f}", f"{row['lift']:.2f}"]
        table.add_row(row["policy"], *rates, f"{row['missed_bytes_per_token'] / 1024:.1f}", f"{row['belady']:.3f}")
    return table


def _last(result: Mapping[str, Any]) -> str:
    text = result["text"]
    return (
        f"{result['store']} is calibrated on {text['tokens']} tokens of {text['name']} in {result['seconds']:.0f} s; "
        f"the exact perplexity of the pieces that settings were measured on is {result['exact_perplexity']:.4f}\n"
        f"{cost(result)}"
    )


def cost(result: Mapping[str, Any]) -> str:
    """What a layer took, and by that what well-known shapes would take on this machine, at as many tokens."""
    weights = result["neurons"] * result["neuron_weights"]
    each = result["seconds"] / (result["blocks"] * weights)
    hours = [f"{name} {each * of / 3600:.1f} h" for name, of in (("7B", 32 * 3 * 11008 * 4096), ("70B", _OF_70B))]
    return (
        f"{result['seconds'] / result['blocks']:.1f} s a layer of {weights / 1e6:.2f}M weights; by its weights "
        f"{' and '.join(hours)} with as many tokens, less where layers are larger"
    )
