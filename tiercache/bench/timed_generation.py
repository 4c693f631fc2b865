"""An offloaded model that generates under a clock: plainly as transformers has it, or with one drafter.

Knows `offload`'s options and statistics from outside, as a user would; nothing of tables.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tiercache.compat import BaseStreamer
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig, Precision
from tiercache.config.sizes import Budget
from tiercache.draft.base import Drafter, TreeBudget
from tiercache.draft.registry import LOOKUPS
from tiercache.draft.tree import DraftTree
from tiercache.engine.offload import open_offloaded

PLAIN = "plain"  # transformers' own loop
NONE = "none"  # ours, without trees
NGRAMS = ("ngram", *LOOKUPS)
NAMED = (*NGRAMS, "resident", "auto")
_DEPTH, _WIDTH = 16, 8  # of a tree at most
_WARM_UP = 16  # tokens that nobody times


@dataclass(frozen=True, kw_only=True)
class ModelSetting:
    """Where a model runs.

    Attributes:
        name: of the model.
        store: its planes.
        precision, hbm, dram, link_gbps, context: as `offload` takes them.
    """

    name: str
    store: str
    precision: Precision = "int8"
    hbm: str | None = None
    dram: str = "auto"
    link_gbps: float | None = None
    context: int = 256

    def text(self) -> str:
        """As tables have it."""
        parts = [f"{self.name} {self.precision}", f"hbm={self.hbm}" if self.hbm else "", f"dram={self.dram}"]
        parts.append(f"link {self.link_gbps:g} GB/s emulated" if self.link_gbps else "")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Who drafts, and how much.

    Attributes:
        drafter: of `NAMED`, a small model's folder, `PLAIN` or `NONE`.
        grower: of trees; "own" where the drafter has none to choose.
        nodes: of every tree; None where the budgeter chooses.
        most: nodes of a tree that the budgeter may choose.
    """

    drafter: str
    grower: str = "own"
    nodes: int | None = None
    most: int = 64

    def options(self) -> DraftConfig | None:
        """The options of drafting, with a drafter that has seen nothing yet; None to decode plainly."""
        if self.drafter == PLAIN:
            return None
        if self.drafter == NONE:
            return DraftConfig(drafter=_Silent(), nodes=1, depth=1, width=1, fixed=True)
        grower = "best-first" if self.grower == "own" else self.grower
        nodes, fixed = (self.most, False) if self.nodes is None else (self.nodes, True)
        verify: Any = "rejection" if self.draws else "walk"
        return DraftConfig(
            drafter=self.drafter,
            grower=grower,
            nodes=nodes,
            depth=min(_DEPTH, nodes),  # no more than the tree has: room is reserved for it
            width=min(_WIDTH, nodes),
            fixed=fixed,
            verify=verify,
        )

    @property
    def draws(self) -> bool:
        """Its trees are drawn by chance, so that sampled texts are others."""
        return self.grower.startswith("rsd")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One text to write.

    Attributes:
        prompt: token ids.
        temperature: 0 for greedy decoding.
        seed: of torch's generator.
    """

    prompt: tuple[int, ...]
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text that was written.

    Attributes:
        text: the new tokens.
        first_s: seconds to the first of them, the prompt's pass included.
        seconds: from then to the end.
        passes: of the target for the tokens after the first.
        nodes: that these passes verified beside.
    """

    text: tuple[int, ...]
    first_s: float
    seconds: float
    passes: int
    nodes: int = 0

    @property
    def tokens(self) -> int:
        """That `seconds` and `passes` are of."""
        return len(self.text) - 1


class TimedModel:
    """An open model; made by `open_timed`.

    Attributes:
        model: from `offload`.
        entry: how it decodes.
    """

    def __init__(self, model: Any, entry: Entry) -> None:
        self.model, self.entry = model, entry

    @property
    def exact(self) -> bool:
        """Whether it computes in fp32, where every drafter must write the same text."""
        return bool(self.model.dtype == torch.float32)

    @property
    def drafting(self) -> dict[str, Any] | None:
        """The statistics of drafting as plain data, the warm-up included; None without a drafter."""
        found: dict[str, Any] | None = self.model.tiercache.stats().to_dict()["drafting"]
        return found

    def warm(self, cell: Cell, tokens: int) -> None:
        """Write a text that nobody times, of `tokens` tokens at most."""
        self.run(cell, min(tokens, _WARM_UP))

    def run(self, cell: Cell, tokens: int) -> Sample:
        """Write up to `tokens` tokens; fewer where the model ends the text."""
        clock = _Clock()
        ids = torch.tensor([cell.prompt], device=self.model.tiercache.stats().device)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if cell.temperature > 0:
            options = {"do_sample": True, "temperature": cell.temperature, "top_p": 1.0, "top_k": 0}
        before = self._drafted()
        torch.manual_seed(cell.seed)
        begin = time.perf_counter()
        text = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
        found = text[0, len(cell.prompt) :].tolist()  # waits for the device
        end = time.perf_counter()
        passes, nodes = (now - then for now, then in zip(self._drafted(), before, strict=True))
        first_s, seconds = clock.first_s - begin, end - clock.first_s
        return Sample(text=tuple(found), first_s=first_s, seconds=seconds, passes=passes or len(found) - 1, nodes=nodes)

    def gap(self, cell: Cell, text: tuple[int, ...]) -> float:
        """How far apart the two likeliest tokens after `text` are, as a part of the logits' size."""
        ids = torch.tensor([[*cell.prompt, *text]], device=self.model.tiercache.stats().device)
        with torch.inference_mode():
            first, second = self.model(ids, logits_to_keep=1).logits[0, -1].float().topk(2).values.tolist()
        return float((first - second) / max(abs(first), abs(second), 1e-9))

    def _drafted(self) -> tuple[int, int]:
        """Passes with or without a tree, and nodes verified, so far; zeros without a drafter."""
        drafting = self.model.tiercache.stats().drafting
        return (0, 0) if drafting is None else (drafting.rounds, drafting.nodes)


@contextmanager
def open_timed(setting: ModelSetting, entry: Entry) -> Iterator[TimedModel]:
    """Open the model for one way of decoding; a drafter begins with nothing learnt."""
    draft = entry.options()
    config = OffloadConfig(
        hbm=None if setting.hbm is None else Budget.parse(setting.hbm),
        dram=Budget.parse(setting.dram),
        precision=setting.precision,
        context=setting.context,
        logits=1 if draft is None else draft.nodes + 1,
        link_gbps=setting.link_gbps,
        cpu_tokens=0 if setting.link_gbps else None,  # a slow link is asked for to be used
        draft=draft,
    )
    with open_offloaded(setting.store, config, show_progress=False) as model:
        yield TimedModel(model, entry)


class _Silent(Drafter):
    """Never guesses: what its loop costs more than transformers' is the loop's own cost."""

    name = NONE

    def propose(self, budget: TreeBudget) -> DraftTree:
        return DraftTree()


class _Clock(BaseStreamer):
    """Notes when the first new token came."""

    def __init__(self) -> None:
        self._calls = 0
        self.first_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first."""
        self._calls += 1
        if self._calls == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""
