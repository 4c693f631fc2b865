"""The backend of this machine's processor: C with vector instructions, chosen when it is loaded.

Work is shared among the threads of the OpenMP runtime that torch has loaded, so that no second set of threads competes
with torch's. The arithmetic, which is the same to the bit for every instruction set, number of threads and number of
tokens, is told in `source/planes.h`.
"""

from collections.abc import Sequence
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels import contract
from tiercache.kernels.activation import check_activation
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS, Kernels, Parts, QuantizedActivations, Selection
from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.layer import Calls, CpuAttention, CpuFeedForward, declare, takes_heads
from tiercache.kernels.cpu.library import CMatrix, CTeam, load, openmp
from tiercache.kernels.cpu.views import Views, check_on_host, input_view, row_lists, row_stride, some_rows
from tiercache.quant.planes import Planes, num_groups

_ALIGN = 64
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are


class CpuKernels(Kernels):
    """See `contract.Kernels`.

    Args:
        isa: an instruction set of `build.ISAS`; the best that this processor has by default.
        threads: as many as torch uses by default.

    Raises:
        EnvironmentUnsupportedError: no compiler, or the processor lacks the instructions.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        has = build.instruction_sets()
        self.isa = isa or has[0]
        if self.isa in build.ISAS and self.isa not in has:
            raise EnvironmentUnsupportedError(f"this processor lacks {self.isa}; it has {', '.join(has)}")
        path = build.library(self.isa)
        self.name, self.device = f"cpu ({self.isa})", torch.device("cpu")
        self._library = load(path)
        declare(self._library)
        self._few = self._library.tc_few()
        self._threads = threads
        self._parallel = self._library.tc_pool() or openmp()
        self._teams: dict[int, CTeam] = {}
        self._sizes: dict[tuple[int, int, int], int] = {}
        self._views = Views()
        self._calls = Calls(self._library, self._views, self._team)

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        contract.check_activations(x)
        check_on_host("x", x)
        tokens, columns = x.shape
        num_groups(columns, group)  # refuses a size that there is not
        few = int(tokens <= self._few)
        nbytes = self._sizes.get((tokens, columns, group))
        if nbytes is None:
            nbytes = self._sizes[tokens, columns, group] = self._library.tc_prepared_bytes(tokens, columns, group)
        memory = torch.empty(nbytes + _ALIGN, dtype=torch.uint8, device="cpu")
        memory = memory[-memory.data_ptr() % _ALIGN :]
        source, keep = input_view(x)
        self._library.tc_prepare(byref(source), columns, group, few, memory.data_ptr(), byref(self._team()))
        del keep
        return QuantizedActivations(tokens, columns, group, (memory,), self.name)

    def hadamard(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        contract.check_transform(x, before, after)
        check_on_host("x", x)  # and so are the factors, which are where x is
        out = torch.empty(x.shape, **_FLOATS)
        source, keep = input_view(x)
        first = None if before is None else before.data_ptr()
        last = None if after is None else after.data_ptr()
        self._library.tc_hadamard(byref(source), x.shape[1], first, last, out.data_ptr(), byref(self._team()))
        del keep
        return out

    def matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        contract.check_output(out, x.tokens, contract.checked_rows(rows, weight), self.device)
        self._check_match(x, weight)
        lists = row_lists(rows)
        self._matmul(x, some_rows(self._views.matrix(weight), lists), out)
        del lists

    def matmuls(self, x: QuantizedActivations, weights: Parts, outs: Sequence[Tensor], rows: Selection = None) -> None:
        if len(weights) != len(outs) or not weights:
            raise UsageError(f"{len(weights)} matrices and {len(outs)} outputs; give one for each")
        count = contract.checked_rows(rows, *weights)
        for weight, out in zip(weights, outs, strict=True):
            contract.check_output(out, x.tokens, weight.rows if rows is None else count, self.device)
            self._check_match(x, weight)
        pair, lists = self._views.pair(weights), row_lists(rows)
        if pair is None:
            for weight, out in zip(weights, outs, strict=True):
                self._matmul(x, some_rows(self._views.matrix(weight), lists), out)
            return
        both = torch.zeros(x.tokens, count, 2, **_FLOATS)
        self._matmul(x, some_rows(pair, lists), both.flatten(1))
        for part, out in enumerate(outs):
            out += both[..., part]
        del lists

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        contract.check_activations(x, contract.checked_rows(rows, weight))
        check_on_host("x", x)
        contract.check_output(out, x.shape[0], weight.columns, self.device)
        lists = row_lists(rows)
        matrix = some_rows(self._views.matrix(weight), lists)
        source, keep = input_view(x)
        scratch = torch.empty(self._library.tc_down_scratch(x.shape[1], weight.columns, x.shape[0]), **_FLOATS)
        where = (scratch.data_ptr(), out.data_ptr(), row_stride(out), byref(self._team()))
        self._library.tc_product_down(byref(matrix), byref(source), *where)
        del lists, keep

    def ffn(
        self, x: QuantizedActivations, inward: Parts, down: Planes, activation: str, out: Tensor, rows: Selection = None
    ) -> None:
        check_activation(activation)
        count = contract.checked_rows(rows, down, *inward)
        contract.check_output(out, x.tokens, down.columns, self.device)
        for weight in inward:
            self._check_match(x, weight)
            if weight.rows != down.rows:
                raise UsageError(f"inward matrices of {weight.rows} neurons beside a down matrix of {down.rows}")
        entry = self._views.matrix(inward[0]) if len(inward) == 1 else self._views.pair(inward)
        if entry is None:
            raise UsageError(f"{len(inward)} inward matrices of unlike layout; a block has one, or gate and up alike")
        lists = row_lists(rows)
        first, last = some_rows(entry, lists), some_rows(self._views.matrix(down), lists)
        scratch = torch.empty(self._library.tc_ffn_scratch(count, down.columns, x.tokens), **_FLOATS)
        kind, few, data = ACTIVATIONS.index(activation), int(x.tokens <= self._few), x.data[0].data_ptr()
        where = (data, scratch.data_ptr(), out.data_ptr(), row_stride(out), byref(self._team()))
        self._library.tc_ffn(byref(first), byref(last), kind, x.tokens, few, *where)
        del lists

    def linear(self, x: Tensor, weight: Planes, factors: Tensor | None) -> Tensor:
        contract.check_activations(x, weight.columns)
        contract.check_transform(x, factors)
        check_on_host("x", x)
        matrix, tokens = self._views.matrix(weight), x.shape[0]
        source, keep = input_view(x)
        out = torch.empty(tokens, weight.rows, dtype=x.dtype, device="cpu")
        scratch = self._calls.scratch(self._library.tc_linear_scratch(byref(matrix), tokens))
        first = None if factors is None else factors.data_ptr()
        where = (first, scratch.data_ptr(), out.data_ptr(), byref(self._team()))
        self._library.tc_linear(byref(matrix), byref(source), *where)
        del keep
        return out

    def takes_heads(self, heads: int, key_heads: int, head_dim: int) -> bool:
        return takes_heads(heads, key_heads, head_dim)

    def attention(self, weights: AttentionWeights) -> Attention:
        return CpuAttention(weights, self._calls)

    def feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        return CpuFeedForward(weights, self._calls)

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        for what, tensor in (("rows", rows), ("out", out)):
            check_on_host(what, tensor)
        needed = sum(piece.shape[1] for piece in pieces) * rows.numel()
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < needed:
            raise UsageError(f"out is {out.dtype} of {out.numel()}, expected at least {needed} bytes in one piece")
        for piece in pieces:
            check_on_host("a piece", piece)
            if piece.dtype != torch.uint8 or piece.ndim != 2 or piece.stride(1) != 1:
                raise UsageError(f"cannot gather rows of {piece.dtype} {list(piece.shape)}; give byte matrices")
            contract.checked_index(rows, piece.shape[0])
        index, team, at = rows.to(torch.int64).contiguous(), self._team(), out.data_ptr()
        for piece in pieces:
            source, stride, width = piece.data_ptr(), piece.stride(0), piece.shape[1]
            self._library.tc_gather(source, stride, width, index.data_ptr(), index.numel(), at, byref(team))
            at += width * index.numel()

    def read(self, address: int, nbytes: int) -> int:
        """All bytes there or-ed together: what a read of memory takes at least, by one thread."""
        return int(self._library.tc_read(address, nbytes))

    def _matmul(self, x: QuantizedActivations, matrix: CMatrix, out: Tensor) -> None:
        few, data = int(x.tokens <= self._few), x.data[0].data_ptr()
        where = (out.data_ptr(), row_stride(out), byref(self._team()))
        self._library.tc_product(byref(matrix), x.tokens, few, data, *where)

    def _check_match(self, x: QuantizedActivations, weight: Planes) -> None:
        if (x.columns, x.group) != (weight.columns, weight.group):
            raise UsageError(
                f"activations of {x.columns} in groups of {x.group} for a matrix of {weight.columns} in groups of "
                f"{weight.group}; prepare them for it"
            )
        if x.backend != self.name:
            raise UsageError(f"activations prepared by {x.backend or 'others'} for {self.name}; prepare them again")

    def _team(self) -> CTeam:
        """The threads that torch uses now."""
        threads = self._threads or torch.get_num_threads()
        if threads not in self._teams:
            self._teams[threads] = CTeam(self._parallel, threads if self._parallel else 1, 0)
        return self._teams[threads]
