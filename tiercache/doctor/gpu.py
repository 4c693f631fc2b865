"""What the doctor asks of GPUs: code that they can run, their PCIe link, memory that can be pinned for them."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercache.config.sizes import human
from tiercache.doctor.checks import Check, dotted, module, text_of

# torch 2.15 dropped the last builds with code for Maxwell, Pascal and Volta.
LEGACY_INSTALL = 'pip install "torch<2.15" --index-url <the cu126 index named on pytorch\'s install page>'
_LEGACY_BELOW = (7, 5)
_PINNED_SAMPLE_BYTES = 256 << 20


@dataclass(frozen=True)
class PcieLink:
    """A GPU's PCIe link: generation and lanes, now and at most; 0 where the driver does not say."""

    name: str
    generation: int
    max_generation: int
    width: int
    max_width: int


def gpu(folder: Path) -> list[Check]:
    """Whether torch can use the GPUs that are there."""
    torch = module("torch")
    if torch is None:
        return []  # said already
    with warnings.catch_warnings():  # torch warns of an old card in its own words
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return [unusable(_driver_gpus(), torch.__version__, torch.version.cuda)]
        archs = torch.cuda.get_arch_list()
        devices = range(torch.cuda.device_count())
        return [
            architecture(torch.cuda.get_device_name(n), torch.cuda.get_device_capability(n), archs) for n in devices
        ]


def unusable(seen: Sequence[str], torch_version: str, cuda: str | None) -> Check:
    """What it means that torch can use no GPU, given those that the driver shows."""
    if not seen:
        return Check("gpu", "ok", "none: CPU only")
    if cuda is None:
        return Check(
            "gpu",
            "fail",
            f"{', '.join(seen)}; but torch {torch_version} is built without CUDA",
            f"install a torch with CUDA; for Maxwell, Pascal and Volta: {LEGACY_INSTALL}",
        )
    return Check(
        "gpu",
        "fail",
        f"{', '.join(seen)}; but torch {torch_version} (CUDA {cuda}) cannot use it",
        "update the NVIDIA driver to one for that CUDA ('nvidia-smi' says which it has), or install a torch for an "
        "older CUDA; see also that CUDA_VISIBLE_DEVICES does not hide the card",
    )


def architecture(name: str, capability: tuple[int, int], archs: Sequence[str]) -> Check:
    """Whether this torch has code that the GPU can run."""
    label = f"{name}, compute capability {dotted(capability)}"
    if runs_on(capability, archs):
        return Check("gpu", "ok", label)
    legacy = capability < _LEGACY_BELOW
    advice = LEGACY_INSTALL if legacy else "install a torch that is built for this card, from pytorch's install page"
    return Check("gpu", "fail", f"{label}; torch has code for {', '.join(archs) or 'no GPU'} only", advice)


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether code of one of `archs` runs: binaries (sm_XY) on the same major version, PTX (compute_XY) on any later.

    >>> runs_on((6, 1), ["sm_50", "sm_60"]), runs_on((6, 1), ["sm_75", "sm_80"])
    (True, False)
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(archs)):
        built = (int(major), int(minor))
        same_family = kind == "compute" or built[0] == capability[0]
        exactly = suffix == "a"  # code for that chip alone
        if built == capability if exactly else built <= capability and same_family:
            return True
    return False


def _driver_gpus() -> list[str]:
    """Names of the GPUs that the driver shows, whatever torch can do."""
    if names := [link.name for link in _links()]:
        return names
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    found = (re.search(r"Model:\s*(.+)", text_of(path)) for path in sorted(files))
    return [match[1] if match else "an NVIDIA GPU" for match in found]


def pcie(folder: Path) -> list[Check]:
    """The link of each GPU."""
    return [link_check(link) for link in _links()]


def link_check(link: PcieLink) -> Check:
    """Fewer lanes than the card has cost bandwidth for good; a lower generation is how a card saves power at rest."""
    if not link.max_width:
        return Check("pcie", "ok", f"{link.name}: the driver does not say")
    found = f"{link.name}: gen {link.generation} x{link.width} now, gen {link.max_generation} x{link.max_width} at most"
    if link.width < link.max_width:
        return Check("pcie", "warn", found, "weights stream slower: use a slot with all lanes, and check the riser")
    resting = link.generation < link.max_generation
    return Check("pcie", "ok", found, "a card at rest lowers the generation; look again under load" if resting else "")


def _links() -> list[PcieLink]:
    nvml = module("pynvml")
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver
        return []
    try:
        return [_link(nvml, nvml.nvmlDeviceGetHandleByIndex(n)) for n in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _link(nvml: Any, device: Any) -> PcieLink:
    def ask(name: str) -> int:
        try:
            return int(getattr(nvml, f"nvmlDeviceGet{name}")(device))
        except nvml.NVMLError:  # virtual machines hide it
            return 0

    generations = ask("CurrPcieLinkGeneration"), ask("MaxPcieLinkGeneration")
    return PcieLink(
        str(nvml.nvmlDeviceGetName(device)), *generations, ask("CurrPcieLinkWidth"), ask("MaxPcieLinkWidth")
    )


def pinned_memory(folder: Path) -> list[Check]:
    """Whether memory can be pinned; tried, since the driver need not keep to the limit that the shell shows."""
    limit = f"memlock {_memlock()}"
    torch = module("torch")
    if torch is None or not torch.cuda.is_available():
        return [Check("pinned memory", "ok", f"{limit}; without a GPU nothing is pinned")]
    size = human(_PINNED_SAMPLE_BYTES)
    try:
        torch.empty(_PINNED_SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        advice = "raise the limit: 'ulimit -l unlimited', or --ulimit memlock=-1 for a container"
        return [Check("pinned memory", "fail", f"{size} could not be pinned ({reason}); {limit}", advice)]
    return [Check("pinned memory", "ok", f"{size} pinned; {limit}")]


def _memlock() -> str:
    try:
        import resource  # absent on Windows
    except ImportError:
        return "unknown"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else human(soft)
