"""A linear module over planes behaves as the module it stands in for, whatever is done to its input."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tiercache.errors import UsageError
from tiercache.kernels.contract import QuantizedActivations
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.model import linear
from tiercache.model.linear import Inputs, PlaneForward, partners
from tiercache.quant.hadamard import restored, stored
from tiercache.quant.planes import Planes, encode, plane_row_bytes, scale_row_bytes
from tiercache.store.manifest import PlaneWeight

NEURONS, HIDDEN, GROUP = 70, 96, 64


class Counting(CpuKernels):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__("portable")
        self.asked: list[str] = []

    def quantize_activations(self, x: torch.Tensor, group: int) -> QuantizedActivations:
        self.asked.append("prepare")
        return super().quantize_activations(x, group)

    def _matmul(self, x: QuantizedActivations, matrix: object, out: torch.Tensor) -> None:
        self.asked.append("product")
        super()._matmul(x, matrix, out)


def bundle() -> tuple[torch.Tensor, list[PlaneWeight], list[Planes]]:
    """A slot with gate, up and down of 70 neurons, and each as a weight."""
    factors = torch.rand(HIDDEN) + 0.5  # of the down columns
    made = [torch.randn(NEURONS, HIDDEN) * 0.05 for _ in range(3)]
    parts = [encode(stored(m, factors if m is made[2] else None), GROUP).at("int4") for m in made]
    at, pieces, places = 0, [], []
    for plane in range(2):
        pieces.append(torch.stack([part.planes[plane] for part in parts], 1).flatten())
        assert pieces[-1].numel() == NEURONS * 3 * plane_row_bytes(HIDDEN, GROUP, plane)
    pieces.append(torch.stack([part.scales for part in parts], 1).flatten().view(torch.uint8))
    assert pieces[-1].numel() == NEURONS * 3 * scale_row_bytes(HIDDEN, GROUP)
    pieces.append(factors.view(torch.uint8))
    for piece in pieces:
        places.append(at)
        at += piece.numel()
    fields = {"plane_units": (0, 0), "rows": NEURONS, "columns": HIDDEN, "group": GROUP, "parts": 3}
    where = {"plane_at": tuple(places[:2]), "scale_at": places[2]}
    weights = [PlaneWeight(own=(part,), transposed=part == 2, **fields, **where) for part in range(3)]
    return torch.cat(pieces), weights, parts


class Block:
    """Gate, up and down as modules, and what they should give."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.kernels, self.inputs = Counting(), Inputs()
        self.slot, weights, self.parts = bundle()
        self.modules = [nn.Linear(HIDDEN, NEURONS), nn.Linear(HIDDEN, NEURONS, bias=False)]
        self.modules.append(nn.Linear(NEURONS, HIDDEN, bias=False))
        names = ("gate", "up", "down")
        pairs = partners(list(zip(names, weights, self.modules, strict=True)))
        assert pairs == {"gate": ("up", weights[1])}
        self.forwards = []
        for name, module, weight in zip(names, self.modules, weights, strict=True):
            forward = PlaneForward(name, module, weight, {"cpu": self.kernels}, self.inputs, pairs.get(name))
            forward.slots = (self.slot,)
            self.forwards.append(forward)

    def wanted(self, place: int, x: torch.Tensor) -> torch.Tensor:
        factors = self.slot[-4 * HIDDEN :].view(torch.float32) if place == 2 else None
        weight = restored(self.parts[place], factors, torch.empty(NEURONS, HIDDEN)).double()
        bias = self.modules[place].bias
        result = x.double() @ (weight if place == 2 else weight.T)
        return result if bias is None else result + bias.double()


@pytest.fixture
def block() -> Iterator[Block]:
    with torch.no_grad():
        yield Block()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and bool(((got - want).abs() <= 1e-3 * want.abs().max()).all())


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (2, 3, HIDDEN), (1, 0, HIDDEN), (600, HIDDEN)], ids=str)
def test_each_gives_what_the_module_would(block: Block, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    hidden = [block.forwards[place](x) for place in (0, 1)]
    for place in (0, 1):
        assert hidden[place].shape == (*shape[:-1], NEURONS)
        assert not hidden[place].numel() or close(hidden[place], block.wanted(place, x))
    down = block.forwards[2](hidden[0])
    assert down.shape == shape
    assert not down.numel() or close(down, block.wanted(2, hidden[0]))


def test_gate_and_up_are_prepared_and_multiplied_once(block: Block) -> None:
    x = torch.randn(4, HIDDEN)
    block.forwards[0](x)
    block.forwards[1](x)
    assert block.kernels.asked == ["prepare", "product"]


def test_long_inputs_are_multiplied_once_for_each(block: Block) -> None:
    x = torch.randn(600, HIDDEN)
    block.forwards[0](x)
    block.forwards[1](x)
    assert block.kernels.asked.count("product") == 4  # two pieces each


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_another_input(block: Block, mode: type) -> None:
    with mode():
        x = torch.randn(4, HIDDEN)
        before = block.forwards[0](x)
        x.mul_(2)
        assert close(block.forwards[1](x), block.wanted(1, x))
        assert close(block.forwards[0](x), block.wanted(0, x))
        assert not torch.equal(block.forwards[0](x), before)


def test_on_a_card_nothing_waits_to_see_whether_an_input_has_changed(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "on_host", lambda device: False)  # the kernels are a card's
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("this waits for a card"))
    with torch.inference_mode():
        x = torch.randn(3, HIDDEN)
        for place in (0, 1):
            assert close(block.forwards[place](x), block.wanted(place, x))
    assert block.kernels.asked == ["prepare", "product"] * 2


def test_up_alone_and_another_input_for_up(block: Block) -> None:
    x, y = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
    block.forwards[0](x)
    assert close(block.forwards[1](y), block.wanted(1, y))
    assert close(block.forwards[1](x), block.wanted(1, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_input(block: Block, dtype: torch.dtype) -> None:
    x = torch.randn(3, HIDDEN).to(dtype)
    got = block.forwards[1](x)
    assert got.dtype == dtype
    assert ((got.double() - block.wanted(1, x)).abs() <= 1e-2 * block.wanted(1, x).abs().max()).all()


def test_under_autocast(block: Block) -> None:
    x = torch.randn(3, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert [forward(x).dtype for forward in block.forwards[:2]] == [torch.bfloat16] * 2
        assert block.modules[1](x).dtype == torch.bfloat16


def test_gradients_are_refused(block: Block) -> None:
    x = torch.randn(3, HIDDEN, requires_grad=True)
    with torch.enable_grad(), pytest.raises(UsageError, match="no_grad"):
        block.forwards[1](x)


def test_defaults_of_the_process_change_nothing(block: Block) -> None:
    x = torch.randn(3, HIDDEN)
    want = [block.forwards[0](x), block.forwards[1](x)]
    hidden = want[0] * want[1]
    want.append(block.forwards[2](hidden))
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            block.inputs.forget()
            got = [block.forwards[0](x), block.forwards[1](x), block.forwards[2](hidden)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
