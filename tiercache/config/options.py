"""What the user asks of one `offload`, checked before anything is touched.

Knows nothing of hardware. Sizes are in `config.sizes`, the options of drafting in `config.drafting`.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, cast, get_args

from policies.run_plan import RunPlan
from policies.settings import DEFAULT, Settings
from tiercache.config.drafting import DraftConfig, DraftOptions
from tiercache.config.sizes import Budget, SizeLike
from tiercache.errors import UsageError

CALIBRATION_TOKENS = 16_384
"""Of a text that codes are calibrated on: some ten for each input of the widest matrix of a small model."""

Precision = Literal["source", "int8", "int4", "int3"]
STORE_PRECISION: Final = "int8"
"""What is read of a plane store where no precision is named: all of its planes."""
KernelChoice = Literal["auto", "fast", "unfused", "decode"]
Mode = Literal["exact", "mixed"]
ComputeDtype = Literal["auto", "fp32", "fp16", "bf16"]


def of_planes(precision: str) -> bool:
    """Whether weights at this precision are bit planes; at "source" they are the original ones."""
    return precision != "source"


class MixedOptions(TypedDict, total=False):
    """Options of `offload` for choosing planes neuron by neuron; without them a model is run exactly.

    Attributes:
        mode: "exact", or "mixed": each token reads its more important neurons at more bits, others at fewer or not at
            all. That loses something, which `tiercache calibrate` has measured. `precision` is then the precision of
            everything that is no neuron.
        bytes_per_token: what a token may read of the neurons, ranking included: a share of what int8 reads of them
            (0.5), or a size ("1.2GB").
        max_loss: a bound of the loss (KL from int8 on the calibration text, nats a token); then as few bytes as that
            allows.
        policy: with an HBM tier, which neurons stay in its slots: one of `policies.eviction.POLICIES`, or "auto", which
            replays the calibration's trace.
        max_fetches: neurons that a token may bring into the slots of one layer's plane; others do with the planes at
            hand. None for as many as it wants.
        uploads: the deprecated name of max_fetches.
        link_gbps: throttle copies to the HBM tier to so many 1e9 bytes a second, to stand in for another link, in
            either mode; what is measured then is emulated.
    """

    mode: Mode
    bytes_per_token: SizeLike | None
    max_loss: float | None
    policy: str
    max_fetches: int | None
    uploads: int | None
    link_gbps: float | None


class OffloadOptions(MixedOptions, DraftOptions, total=False):
    """Everything that `offload` takes beside places and precisions."""


def default_precision(options: OffloadOptions) -> Precision:
    """What weights are read at where no precision was asked for."""
    return STORE_PRECISION if options.get("mode") == "mixed" else "source"


def read_options(options: OffloadOptions) -> dict[str, Any]:
    """The options as fields of `OffloadConfig`.

    Raises:
        UsageError: an option that there is not, or a size that cannot be read.
    """
    options = _renamed(options)
    mixed, drafts = MixedOptions.__annotations__, DraftOptions.__annotations__
    if unknown := sorted(set(options) - set(mixed) - set(drafts)):
        known = (
            f"of mixed mode {', '.join(name for name in mixed if name != 'uploads')}; of drafting {', '.join(drafts)}"
        )
        raise UsageError(f"unknown option {unknown[0]!r} of offload(); there are {known}")
    fields: dict[str, Any] = {name: value for name, value in options.items() if name in mixed}
    given = options.get("bytes_per_token")
    fields["bytes_per_token"] = None if given is None else Budget.parse(given)
    wanted: dict[str, Any] = {name: value for name, value in options.items() if name in drafts}
    if wanted.get("drafter") is None:
        if idle := sorted(set(wanted) - {"drafter", "lossless"}):
            raise UsageError(f"{idle[0]}= does nothing without a drafter; give drafter='auto', or leave it out")
        return fields
    return fields | {"draft": DraftConfig(**{name.removeprefix("draft_"): value for name, value in wanted.items()})}


def _renamed(options: OffloadOptions) -> OffloadOptions:
    """Options under their names of today."""
    rest = {name: value for name, value in options.items() if name != "uploads"}
    if options.get("uploads") is None:
        return cast("OffloadOptions", rest)
    if options.get("max_fetches") is not None:
        raise UsageError("uploads= is the deprecated name of max_fetches=; leave it out")
    warnings.warn("uploads= is now max_fetches=", DeprecationWarning, stacklevel=5)
    return cast("OffloadOptions", rest | {"max_fetches": options["uploads"]})


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """The options of one `offload`, read and checked: under the same names, and with the same meaning, as there.

    Attributes:
        hbm: None where no such tier was asked for.
        resident: weights are cut by plane, so that passes may do with the planes that stay in the fastest tier.
        draft: how to draft; None to decode plainly.
        plan: "auto" searches, "default" takes the rules of thumb; a plan says what is to come out.
        force_plan: take a plan that was made on another machine.
        settings: how tiers are read and prefetched, where nothing is searched.
        drafts: who drafts, of drafter="auto", as the plan says; empty to choose.
    """

    hbm: Budget | None
    dram: Budget
    precision: Precision = "source"
    context: int = 4096
    logits: int = 512
    device: str = "auto"
    store: Path | None = None
    checks: bool = False
    kernels: KernelChoice = "auto"
    compute_dtype: ComputeDtype = "auto"
    cpu_tokens: int | None = None
    mode: Mode = "exact"
    bytes_per_token: Budget | None = None
    max_loss: float | None = None
    policy: str = "auto"
    max_fetches: int | None = None
    link_gbps: float | None = None
    resident: bool = False
    draft: DraftConfig | None = None
    plan: RunPlan | Literal["auto", "default"] = "auto"
    force_plan: bool = False
    settings: Settings = DEFAULT
    drafts: str = ""

    def __post_init__(self) -> None:
        self._check_mode()
        self._check_resident()
        if self.precision not in get_args(Precision):
            raise UsageError(f"unknown precision {self.precision!r}; choose one of {', '.join(get_args(Precision))}")
        if self.kernels not in get_args(KernelChoice):
            raise UsageError(f"unknown kernels {self.kernels!r}; choose one of {', '.join(get_args(KernelChoice))}")
        if self.compute_dtype not in get_args(ComputeDtype):
            known = ", ".join(get_args(ComputeDtype))
            raise UsageError(f"unknown compute_dtype {self.compute_dtype!r}; choose one of {known}")
        if self.cpu_tokens is not None and (
            isinstance(self.cpu_tokens, bool) or not isinstance(self.cpu_tokens, int) or self.cpu_tokens < 0
        ):
            raise UsageError(f"cpu_tokens={self.cpu_tokens!r} must be a whole number of tokens, 0 or more, or None")
        for name, value in (("context", self.context), ("logits", self.logits)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}={value!r} must be a whole number of tokens, 1 or more; try {name}=512")
        refuse_unknown_device(self.device)

    @property
    def fuses(self) -> bool:
        """Whether kernels may run whole layers."""
        return self.kernels in ("auto", "fast")

    def _check_resident(self) -> None:
        """Refuse resident passes where a matrix has no lower planes to do with."""
        if not self.resident:
            return
        if self.mode != "exact":
            raise UsageError(
                "mode='mixed' has resident passes of its own; leave resident= out, or ask for mode='exact'"
            )
        if self.precision not in ("int8", "int4"):
            raise UsageError(
                "resident passes (drafter='resident' takes them) do with fewer planes than precision="
                f"{self.precision!r} has; ask for 'int8' or 'int4', or drafter='ngram'"
            )
        if self.kernels == "decode":
            raise UsageError(
                "kernels='decode' makes a whole weight for every product, so resident passes would save nothing; leave "
                "kernels= out"
            )

    def _check_policy(self) -> None:
        """Refuse an eviction policy that there is not."""
        if self.policy == "auto":
            return
        from policies.eviction import BOUND, POLICIES  # brings numpy, which `import tiercache` must not

        if not isinstance(self.policy, str) or self.policy not in POLICIES or self.policy == BOUND:
            known = ", ".join(name for name in POLICIES if name != BOUND)
            raise UsageError(f"unknown policy {self.policy!r}; choose auto, or one of {known}")

    def _check_mode(self) -> None:
        """Refuse options of a mode that do not belong together."""
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        self._check_policy()
        for name, value in (("link_gbps", self.link_gbps), ("max_loss", self.max_loss)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"{name}={value!r} must be a number above zero, or None")
        if self.link_gbps is not None and not 0 < self.link_gbps < float("inf"):
            raise UsageError(f"link_gbps={self.link_gbps} must be a number above zero, or None")
        if self.max_fetches is not None and (
            isinstance(self.max_fetches, bool) or not isinstance(self.max_fetches, int) or self.max_fetches < 0
        ):
            raise UsageError(f"max_fetches={self.max_fetches!r} must be a whole number of neurons, 0 or more, or None")
        if self.mode == "exact":
            if self.bytes_per_token is not None or self.max_loss is not None:
                raise UsageError("bytes_per_token= and max_loss= are for mode='mixed'; the exact mode reads every byte")
            if self.policy != "auto" or self.max_fetches is not None:
                raise UsageError("policy= and max_fetches= are for mode='mixed'; exact mode has no slots of neurons")
            return
        if self.draft is not None:
            raise UsageError(
                "drafter= is for exact runs: mode='mixed' chooses neurons token by token, and a tree of tokens would "
                "choose all of them; leave one of the two out"
            )
        if not of_planes(self.precision):
            raise UsageError(
                "mode='mixed' is made of planes: give precision='int8' or 'int4', the precision of what is no neuron"
            )
        if self.kernels == "decode":
            raise UsageError(
                "mode='mixed' multiplies single neurons, which kernels='decode' cannot; leave kernels= out"
            )
        if self.max_loss is not None and not self.max_loss > 0:
            raise UsageError(f"max_loss={self.max_loss} must be above zero; a run without loss is mode='exact'")
        if self.bytes_per_token == Budget():
            raise UsageError("bytes_per_token='auto' says nothing; give a share such as 0.5, a size, or max_loss=")
        if self.bytes_per_token is None and self.max_loss is None:
            raise UsageError("mode='mixed' needs bytes_per_token= (a share of int8's bytes, or a size) or max_loss=")


def refuse_unknown_device(name: object) -> None:
    """Raise `UsageError` for what is no name of a device; it may name one that is not there."""
    if not isinstance(name, str) or re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise UsageError(f"unknown device {name!r}; choose 'auto', 'cpu', 'cuda' or 'cuda:N'")
