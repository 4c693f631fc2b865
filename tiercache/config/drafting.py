"""The options of drafting: how a user gives them, and the same ones checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from tiercache.errors import UsageError

GrowerName = Literal["best-first", "fixed-width", "rsd-c", "rsd-s", "sequoia"]
Verify = Literal["walk", "rejection", "typical"]
LEAST_KEPT = 64  # tokens of a prompt, half of which look at the others


class DraftOptions(TypedDict, total=False):
    """Options of `offload` for drafting: `model.generate` then emits the same tokens in fewer passes.

    Attributes:
        drafter: "auto" (whoever is likely to pay for its room, or nobody; how much, is found out while decoding),
            "resident" (the model's own planes that are in the fastest tier), "ngram" (tables of the text so far), one
            of these tables by its name in `draft.registry`, a small model's checkpoint with the same tokenizer, a
            `Drafter`, or None. Sampled tokens then depend on torch's seed, but on no drafter.
        grower: how trees grow: "best-first", "fixed-width" or "sequoia"; "rsd-c" or "rsd-s" draw by chance.
        draft_nodes, draft_depth: of a tree at most.
        draft_width: nodes that one drafting pass expands, and children that each gets.
        draft_fixed: always draft trees of this size, instead of the size that pays.
        verify: "walk"; "rejection" (recursive rejection sampling, with growers that draw); "typical", which is lossy.
        lossless: False permits what changes the output: verify="typical", `shift` and `speckv`.
        shift: RAPID's eta: how far the target's scores move towards a drafter that drew its tree (verify="rejection").
            Nothing is shifted where nothing was drawn, so with `draft_fixed` alone is a seed's text always the same.
        speckv: tokens of a prompt whose keys and values are kept; which, the drafted ones that follow help to choose.
        learned: a folder in which what was generated is counted, for n-grams of later runs.
    """

    drafter: object
    grower: str
    draft_nodes: int
    draft_depth: int
    draft_width: int
    draft_fixed: bool
    verify: Verify
    lossless: bool
    shift: float
    speckv: int | None
    learned: str | Path | None


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The options of drafting, checked; see `DraftOptions`.

    Attributes:
        drafter: a name, a path, or a `Drafter`.
        grower, verify, lossless, shift, speckv, learned, fixed: as there.
        nodes, depth, width: of a tree at most.
        slots: of the KV cache that a tree may take, its root and nodes tried but not kept included.
    """

    drafter: Any
    grower: str = "best-first"
    nodes: int = 64
    depth: int = 16
    width: int = 4
    fixed: bool = False
    verify: Verify = "walk"
    lossless: bool = True
    shift: float = 0.0
    speckv: int | None = None
    learned: str | Path | None = None

    def __post_init__(self) -> None:
        if self.grower not in get_args(GrowerName):
            raise UsageError(f"unknown grower {self.grower!r}; choose one of {', '.join(get_args(GrowerName))}")
        if self.verify not in get_args(Verify):
            raise UsageError(f"unknown verify={self.verify!r}; choose one of {', '.join(get_args(Verify))}")
        for name in ("nodes", "depth", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"draft_{name}={value!r} must be a whole number, 1 or more; try draft_{name}=16")
        if self.verify == "rejection" and not self.grower.startswith("rsd"):
            raise UsageError(
                f"verify='rejection' needs trees that are drawn, which grower={self.grower!r} does not; choose 'rsd-c' "
                "or 'rsd-s', or verify='walk'"
            )
        self._check_tables()
        self._check_losses()

    def _check_tables(self) -> None:
        """Refuse what only some drafters can do; a table of n-grams ranks, and never draws."""
        tables = isinstance(self.drafter, str) and self.drafter in ("auto", "ngram")
        if self.verify == "rejection" and tables:
            raise UsageError(
                f"verify='rejection' needs trees that are drawn, and n-grams, which drafter={self.drafter!r} uses, are "
                "not; choose 'resident' or a small model, or verify='walk'"
            )
        if self.learned is not None and not tables:
            raise UsageError("learned= keeps tables of n-grams; choose drafter='auto' or 'ngram', or leave it out")
        if not isinstance(self.learned, str | Path | None):
            raise UsageError(f"learned={self.learned!r} must be a folder, or None")
        for name, value in (("draft_fixed", self.fixed), ("lossless", self.lossless)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}={value!r} must be True or False")

    def _check_losses(self) -> None:
        """Refuse what changes the output, unless that is meant."""
        shift, speckv = self.shift, self.speckv
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 <= shift < float("inf"):
            raise UsageError(f"shift={shift!r} must be a number of 0 or more; try shift=0.5")
        if speckv is not None and (isinstance(speckv, bool) or not isinstance(speckv, int) or speckv < LEAST_KEPT):
            raise UsageError(f"speckv={speckv!r} must be a number of tokens, {LEAST_KEPT} or more; try speckv=1024")
        if shift and self.verify != "rejection":
            raise UsageError(
                f"shift= goes by what a drafter drew, and verify={self.verify!r} takes what it ranked; give "
                "verify='rejection' and grower='rsd-s' too"
            )
        if self.lossless and self.lossy:
            raise UsageError(f"what is emitted changes with {self.lossy}; say lossless=False if that is meant")

    @property
    def lossy(self) -> str:
        """What changes the output; empty where nothing does."""
        named = {
            "typical": self.verify == "typical",
            f"shift={self.shift:g}": self.shift > 0,
            f"speckv={self.speckv}": self.speckv is not None,
        }
        return " and ".join(name for name, there in named.items() if there)

    @property
    def slots(self) -> int:
        """See the class."""
        return 1 + max(self.nodes, self.depth * min(self.width, self.nodes))
