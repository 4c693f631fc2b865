"""What a child does to see that no kernel reads past the end: one that did would take the process down."""

import ctypes
from pathlib import Path

import torch
from cuda_on_cpu.cases import matrix
from cuda_on_cpu.emulate import Emulation
from torch import Tensor

from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.quant.planes import Planes


def at_the_edge(library: str, precision: str, group: int) -> bool:
    """All kernels on planes and scales that end where readable memory ends; the address space behind is refused."""
    libc, page = ctypes.CDLL(None, use_errno=True), 4096
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    kernels = CudaKernels(torch.device("cpu"), Emulation(Path(library)), switch=24)

    def edged(tensor: Tensor) -> Tensor:
        pages = -(-tensor.nbytes // page)
        start = libc.mmap(None, (pages + 1) * page, 3, 0x22, -1, 0)
        assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
        raw = (ctypes.c_ubyte * tensor.nbytes).from_address(start + pages * page - tensor.nbytes)
        return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    weight = matrix(7, 300, group, precision)
    guarded = Planes(tuple(edged(p) for p in weight.planes), edged(weight.scales), 300, group)
    for tokens in (1, 3, 8, 9, 25):
        x, out, down = torch.randn(tokens, 300), torch.zeros(tokens, 7), torch.zeros(tokens, 300)
        quantized = kernels.quantize_activations(edged(x), group)
        kernels.hadamard(edged(x), edged(torch.ones(300)), edged(torch.ones(300)))
        kernels.matmul(quantized, guarded, out)
        kernels.matmul_transposed(edged(out), guarded, down)
        kernels.ffn(quantized, [guarded, guarded], guarded, "silu", down)
    block = edged(torch.zeros(7 * weight.planes[0].shape[1], dtype=torch.uint8))
    kernels.gather([guarded.planes[0]], torch.arange(7, dtype=torch.int32), block)
    return torch.equal(block, weight.planes[0].flatten())
