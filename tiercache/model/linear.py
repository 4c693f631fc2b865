"""Multiplies a linear module's input by planes where they lie, instead of making its weight first.

The module stays the same object with its parameters, hooks and class; for as long as it is attached, its `forward` is
an instance of `PlaneForward`. Knows modules, planes and kernels; not where slots come from.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tiercache.compat import Conv1D
from tiercache.errors import UsageError
from tiercache.kernels.contract import MAX_TOKENS, Kernels, QuantizedActivations
from tiercache.model.meta_model import layer_of
from tiercache.quant.planes import Planes
from tiercache.store.manifest import PlaneWeight
from tiercache.tiers.device import on_host

_FEW_TOKENS, _ROWS_PER_SUM = 8, 256  # bounds of what `kernels` do; see their sources
_PADDING = 1024


class _Made:
    """Something made from one input, good for as long as that input is the same and unchanged.

    Tensors count their changes in place, but not in inference mode: there a copy tells. Where a card multiplies nothing
    is kept then (`_is_followed`), for to compare would be to wait for it.
    """

    def __init__(self, x: Tensor, what: object) -> None:
        self.what, self._x = what, x
        self._copy = x.clone() if x.is_inference() else None
        self._version = 0 if x.is_inference() else x._version

    def fits(self, x: Tensor) -> bool:
        if self._x is not x:
            return False
        return x._version == self._version if self._copy is None else torch.equal(x, self._copy)


class Inputs:
    """What several modules share of one input: its quantized form, and the result of a partner's matmul."""

    def __init__(self) -> None:
        self._quantized: tuple[tuple[Kernels, int, str], _Made] | None = None
        self._results: dict[str, _Made] = {}

    def quantize_activations(
        self, kernels: Kernels, x: Tensor, tokens: Tensor, weight: PlaneWeight, slot: Tensor
    ) -> QuantizedActivations:
        """`tokens` is x as a matrix, where the kernels compute; the newest one is kept for equal scales."""
        wanted = kernels, weight.group, weight.inputs
        if self._quantized is not None:
            kept, made = self._quantized
            if kept == wanted and made.fits(x) and isinstance(made.what, QuantizedActivations):
                return made.what
        quantized = kernels.quantize_activations(transformed(kernels, tokens, weight, slot), weight.group)
        self._quantized = (wanted, _Made(x, quantized)) if _is_followed(x, kernels) else None
        return quantized

    def keep(self, name: str, x: Tensor, result: Tensor) -> None:
        """Keep what module `name` will be asked for."""
        self._results[name] = _Made(x, result)

    def take(self, name: str, x: Tensor) -> Tensor | None:
        """What was kept for module `name`, if it was made from this very input."""
        made = self._results.pop(name, None)
        return made.what if made is not None and made.fits(x) and isinstance(made.what, Tensor) else None

    def forget(self) -> None:
        """At the end of a pass: inputs and results go."""
        self._quantized = None
        self._results.clear()


class PlaneForward:
    """The forward of one linear module over planes.

    Attributes:
        slots: where its units lie, set for the length of a call: all of them, or the first for fewer planes.
        features: how many outputs it has.

    Args:
        name: the module's.
        module: an `nn.Linear` or a `Conv1D`.
        weight: its planes.
        kernels: multiply, by the kind of device that the slot is on.
        inputs: shared by all modules of the model.
        partner: name and planes of the module that will be called with the same input (up, for gate), or None.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: PlaneWeight,
        kernels: Mapping[str, Kernels],
        inputs: Inputs,
        partner: tuple[str, PlaneWeight] | None = None,
    ) -> None:
        self._name, self._module, self._weight = name, module, weight
        self._kernels, self._inputs, self._partner = kernels, inputs, partner
        self._down = is_down(module, weight)
        self._alone = not self._down and weight.parts == 1 and layer_of(name) is None  # no other has its inputs
        self.features = weight.columns if self._down else weight.rows * len(weight.own)
        self.slots: Sequence[Tensor] = ()
        self._placed: dict[int, tuple[list[int], list[Planes]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in the dtype of x."""
        assert self.slots
        refuse_gradients(x)
        result = self._inputs.take(self._name, x)
        if result is None:
            result = self.multiply(x, self.slots)
        bias = self._module.bias
        if isinstance(bias, Tensor):
            result = result + bias.to(result.dtype)
        return result.view(*x.shape[:-1], self.features)

    def multiply(self, x: Tensor, slots: Sequence[Tensor]) -> Tensor:
        """x [..., inputs] -> [tokens, outputs] by the planes in these slots, without the bias."""
        tokens = x.reshape(-1, x.shape[-1])
        if tokens.shape[0] > MAX_TOKENS:
            result = tokens.new_empty(tokens.shape[0], self.features)
            for at in range(0, tokens.shape[0], MAX_TOKENS):
                piece = tokens[at : at + MAX_TOKENS]
                result[at : at + MAX_TOKENS] = self._matmul(piece, piece, slots, alone=True)
            return result.to(_result_dtype(x))
        if self._alone and slots[0].device == x.device and _result_dtype(x) == x.dtype != torch.float64:
            (planes,) = self._parts(slots)
            return self._kernels[x.device.type].linear(tokens, planes, self._weight.input_factors(slots[0]))
        return self._matmul(x, tokens, slots).to(x.device, _result_dtype(x))

    def _matmul(self, x: Tensor, tokens: Tensor, slots: Sequence[Tensor], *, alone: bool = False) -> Tensor:
        """fp32, on the device of the slots' kernels; slots in main memory may be a GPU's or the CPU's to multiply."""
        kernels = self._kernels[slots[0].device.type]
        tokens = plain(tokens, kernels.device)
        out = torch.zeros(tokens.shape[0], self.features, dtype=torch.float32, device=tokens.device)
        parts = self._parts(slots)
        if self._down:
            kernels.matmul_transposed(tokens, parts[0], out)
            return kernels.hadamard(out, after=self._weight.output_factors(slots[0]).to(out.device))
        quantized = self._inputs.quantize_activations(kernels, x, tokens, self._weight, slots[0])
        if len(parts) == 1 or (self._partner is not None and (alone or not _is_followed(x, kernels))):
            # The partner, if any, will see to itself.
            kernels.matmul(quantized, parts[0], out)
        elif self._partner is None:
            kernels.matmuls(quantized, parts, out.split(self._weight.rows, dim=1))
        else:
            other = torch.zeros_like(out)
            kernels.matmuls(quantized, parts, [out, other])
            self._inputs.keep(self._partner[0], x, other.to(x.device, _result_dtype(x)))
        return out

    def _parts(self, slots: Sequence[Tensor]) -> list[Planes]:
        """The matrices to multiply by, the partner's last; made once for slots that stay, by their number."""
        where = [slot.data_ptr() for slot in slots]
        known = self._placed.get(len(where))
        if known is not None and known[0] == where:
            return known[1]
        first, above = slots[0], slots[1:]
        parts = [self._weight.part(first, part, above) for part in self._weight.own]
        if self._partner is not None:
            parts.append(self._partner[1].part(first, self._partner[1].own[0], above))
        self._placed[len(where)] = where, parts
        return parts


def _is_followed(x: Tensor, kernels: Kernels) -> bool:
    """Whether changes of x are noticed without a wait for a card that nobody would wait for otherwise."""
    return not x.is_inference() or on_host(kernels.device)


def refuse_gradients(x: Tensor) -> None:
    """Raise for an input through which gradients are to flow."""
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError("gradients cannot flow through planes; call the model under torch.no_grad()")


def plain(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, in a dtype that kernels take."""
    return x.to(device, torch.float32 if x.dtype == torch.float64 else x.dtype)


def transformed(kernels: Kernels, tokens: Tensor, weight: PlaneWeight, slot: Tensor) -> Tensor:
    """Inputs [tokens, columns] as the rows of a weight in that slot want them: times their factors, transformed."""
    factors = weight.input_factors(slot)
    return kernels.hadamard(tokens, None if factors is None else factors.to(tokens.device))


def is_down(module: nn.Module, weight: PlaneWeight) -> bool:
    """Whether the stored rows are input features (neurons), so that products are summed over them."""
    return weight.transposed != isinstance(module, Conv1D)


def partners(weights: Sequence[tuple[str, PlaneWeight, nn.Module]]) -> dict[str, tuple[str, PlaneWeight]]:
    """For the first of two equal matrices of a unit that rows of inputs go into, in the order of calls: the second."""
    first: dict[int, str] = {}
    found = {}
    for name, weight, module in weights:
        if is_down(module, weight) or len(weight.own) != 1 or weight.parts < 2:
            continue
        if weight.unit in first:
            found[first[weight.unit]] = (name, weight)
        first[weight.unit] = name
    return found


def scratch_bytes(module: nn.Module, weight: PlaneWeight, tokens: int) -> int:
    """An upper bound of what a matmul of `tokens` allocates in passing, its result in fp32 included."""
    rows = min(tokens, MAX_TOKENS)
    if is_down(module, weight):
        slices = min(rows, _FEW_TOKENS) * -(-weight.rows // _ROWS_PER_SUM)  # of few tokens each has its own sums
        return 4 * (2 * rows + slices) * weight.columns  # sums, and what the transform makes of them
    quantized = 3 * (weight.columns + _PADDING)  # two bytes a number, scales and offsets
    quantized += 4 * weight.columns  # transformed
    results = 4 * weight.rows * (4 if weight.parts > 1 and len(weight.own) == 1 else 2 * len(weight.own))
    return rows * (quantized + results)  # gate and up are made by turns, then parted


def _result_dtype(x: Tensor) -> torch.dtype:
    """What a linear module would return for x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
