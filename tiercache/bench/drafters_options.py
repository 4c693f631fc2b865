"""What the benchmark of drafters is asked for. Knows names and numbers; opens nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tiercache.bench.timed_generation import NAMED, NGRAMS, Entry
from tiercache.config.drafting import GrowerName
from tiercache.config.options import Precision
from tiercache.errors import UsageError

_MOST = 64  # nodes that the budgeter may choose, as `offload` lets it by default


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        models: checkpoints or plane stores.
        text: a file to cut prompts from; None for some of Python's library.
        prompts: for each seed, each its own.
        prompt_tokens, tokens: of a prompt, and to write.
        plain_tokens: that plain decoding writes; as many if None.
        temperatures, seeds: of sampling; 0 is greedy.
        drafters: of `NAMED`, or folders of small models.
        growers: for drafters that have a model.
        nodes: of trees; None for the budgeter's choice, up to 64, or the largest of the others if that is more.
        repeats: of everything; medians are told.
        precision, hbm, dram, link_gbps, context: as `offload` takes them; `context` is what is needed if None.
        show_progress: tell of each row; None means where standard error is a terminal.

    Raises:
        UsageError: a number that cannot be, or a name that there is not.
    """

    models: tuple[Path, ...]
    text: Path | None = None
    prompts: int = 3
    prompt_tokens: int = 64
    tokens: int = 128
    plain_tokens: int | None = None
    temperatures: tuple[float, ...] = (0.8, 0.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    drafters: tuple[str, ...] = NAMED
    growers: tuple[str, ...] = ("best-first",)
    nodes: tuple[int | None, ...] = (4, 16, 64, None)
    repeats: int = 1
    precision: Precision = "int8"
    hbm: str | None = None
    dram: str = "auto"
    link_gbps: float | None = None
    context: int | None = None
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        least = {"models": len(self.models), "prompts": self.prompts, "prompt tokens": self.prompt_tokens}
        least |= {"seeds": len(self.seeds), "temperatures": len(self.temperatures), "repeats": self.repeats}
        least |= {"sizes of trees": len(self.nodes)}
        for what, count in least.items():
            if count < 1:
                raise UsageError(f"{count} {what} measure nothing; give 1 at least")
        if min(self.tokens, self.plain_tokens or self.tokens) < 2:
            raise UsageError("speeds are of the tokens after the first; write 2 at least")
        if bad := [str(nodes) for nodes in self.nodes if nodes is not None and nodes < 1]:
            raise UsageError(f"trees of {bad[0]} nodes; give 1 or more, or auto")
        if bad := [str(value) for value in self.temperatures if not 0 <= value < float("inf")]:
            raise UsageError(f"a temperature of {bad[0]}; give 0 for greedy decoding, or more")
        if bad := [name for name in self.growers if name not in get_args(GrowerName)]:
            raise UsageError(f"unknown grower {bad[0]!r}; choose among {', '.join(get_args(GrowerName))}")
        if bad := [name for name in self.drafters if name not in NAMED and not Path(name).is_dir()]:
            raise UsageError(
                f"{bad[0]!r} is neither a drafter nor a small model's folder; there are {', '.join(NAMED)}"
            )
        if not self.entries():
            raise UsageError("drafter auto has no fixed size, and draws no trees; add auto to the nodes")

    def entries(self) -> list[Entry]:
        """Every row's way to draft."""
        most = max(_MOST, *(count or 0 for count in self.nodes))
        found = []
        for drafter in self.drafters:
            for grower in ("own",) if drafter in NGRAMS else self.growers:
                ways = [Entry(drafter=drafter, grower=grower, nodes=count, most=most) for count in self.nodes]
                found += [way for way in ways if drafter != "auto" or (way.nodes is None and not way.draws)]
        return found
