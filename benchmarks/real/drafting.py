"""Each drafter over the instructions, turn about with plain decoding: tokens a pass, acceptance, tokens a second.

Every way of decoding is open at once and writes each answer in its turn, since a shared machine's speed changes within
minutes. Greedy answers are compared token by token with plain decoding's; in bf16 ties may fall either way.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercache.bench.timed_generation import PLAIN, Cell, Entry, ModelSetting, Sample, TimedModel, open_timed
from tiercache.errors import DoesNotFitError
from tiercache.progress import note

DRAFTERS = ("ngram", "resident", "auto")
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True)
class Place:
    """Where the weights lie.

    Attributes:
        name: as the table has it.
        hbm: budget of the HBM tier; None for none.
        link_gbps: of the emulated link to it.
        every: of so many instructions one is asked: a slow place is measured on fewer.
        most: nodes of a tree; room is reserved for so many.
    """

    name: str
    hbm: str | None = None
    link_gbps: float | None = None
    every: int = 1
    most: int = 64


PLACES = (
    Place("all in DRAM"),
    # two fifths of int8's bytes stream; 0.4 GB/s is to this processor's products what PCIe 4 is to a 3090's memory
    Place("emulated link of 0.4 GB/s, hbm=128MiB", "128MiB", 0.4, every=2, most=8),
)


def contest(store: Path, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
    """Rows of every place, temperature and drafter.

    Args:
        store: plane store of the model; its int8 is the target.
        prompts: token ids.
        tokens: of an answer at most.
    """
    rows = []
    for place in PLACES:
        for temperature in TEMPERATURES:
            some = prompts[: -(-len(prompts) // place.every)]  # kinds come by turns
            cells = [Cell(prompt=tuple(ids), temperature=temperature, seed=n) for n, ids in enumerate(some)]
            rows += _rows(store, place, cells, tokens)
            note(f"drafters, {place.name}, T={temperature:g}, {len(cells)} instructions: done", show=True)
    return rows


def _rows(store: Path, place: Place, cells: Sequence[Cell], tokens: int) -> list[dict[str, Any]]:
    context = max(len(cell.prompt) for cell in cells) + tokens
    places: dict[str, Any] = {"hbm": place.hbm, "dram": "2GiB", "link_gbps": place.link_gbps, "context": context}
    setting = ModelSetting(name=store.name, store=str(store), **places)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        models: dict[str, TimedModel] = {}
        for name in (PLAIN, *DRAFTERS):
            try:
                models[name] = stack.enter_context(open_timed(setting, Entry(drafter=name, most=place.most)))
            except DoesNotFitError as error:
                if name == PLAIN:
                    raise
                rows.append(_left_out(place, cells[0].temperature, name, str(error)))
        samples: dict[str, list[Sample]] = {name: [] for name in models}
        for each in models.values():
            each.warm(cells[0], tokens)
        for cell in cells:
            for name, each in models.items():
                samples[name].append(each.run(cell, tokens))
        lead = {"place": place.name, "temperature": cells[0].temperature}
        return rows + [lead | _row(name, each, samples) for name, each in models.items()]


def _row(name: str, own_model: TimedModel, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    own, plain = samples[name], samples[PLAIN]
    written, passes = sum(each.tokens for each in own), sum(each.passes for each in own)
    same = [a.text == b.text for a, b in zip(own, plain, strict=True)]
    account = own_model.drafting
    return {
        "drafter": name,
        "instructions": len(own),
        "streamed_bytes": _streamed_bytes(own_model.model),
        "tokens": written,
        "tokens_per_pass": written / max(1, passes),
        "tokens_per_s": _rate(own),
        "speed_up": _rate(own) / _rate(plain),
        "acceptance_by_depth": [] if account is None else account["acceptance_by_depth"],
        "plain_rounds": None if account is None else account["plain_rounds"] / max(1, account["rounds"]),
        "same_texts": f"{sum(same)}/{len(same)}",
    }


def _streamed_bytes(model: Any) -> int:
    """What an exact pass brings to the fastest tier, or from the SSD where that is DRAM."""
    tier = model.tiercache.plan.hbm or model.tiercache.plan.dram
    payload: dict[int, int] = model.tiercache.payload
    return sum(payload[key] for key in tier.order if key not in set(tier.placement.pinned))


def _left_out(place: Place, temperature: float, name: str, reason: str) -> dict[str, Any]:
    return {"place": place.name, "temperature": temperature, "drafter": name, "refused": reason}


def _rate(samples: Sequence[Sample]) -> float:
    """Tokens a second behind the first of each text."""
    seconds = sum(each.seconds for each in samples)
    return sum(each.tokens for each in samples) / seconds if seconds else 0.0
