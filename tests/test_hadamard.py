"""The Hadamard transform: what it is, its inverse, and that every backend of the kernels gives the same bits."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant import hadamard
from tiercache.quant.planes import encode

KINDS = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE = ReferenceKernels()


def slow(x: Tensor) -> Tensor:
    """By Sylvester's matrix, block by block, in fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 64:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    out = x.double().clone()
    for first in range(0, x.shape[-1] // 64 * 64, 64):
        out[..., first : first + 64] = x[..., first : first + 64].double() @ matrix / 8
    return out


@pytest.mark.parametrize("columns", [1, 63, 64, 100, 192, 576])
def test_is_sylvesters_matrix_and_its_own_inverse(columns: int) -> None:
    x = torch.randn(5, columns) * torch.randn(5, 1).exp()
    made = hadamard.transform(x)
    assert made.shape == x.shape
    assert (made - slow(x)).abs().max() <= 1e-6 * x.abs().max() * 8
    assert (hadamard.transform(made) - x).abs().max() <= 1e-6 * x.abs().max() * 8
    assert torch.equal(made[:, columns // 64 * 64 :], x[:, columns // 64 * 64 :])
    assert torch.equal(hadamard.transform(x[3]), made[3])


def test_one_large_weight_no_longer_spoils_its_group() -> None:
    rows = torch.randn(32, 256)
    rows[:, 7] *= 30
    plain = torch.empty(32, 256)
    plain.copy_(hadamard.decode(encode(rows).at("int4"), torch.float32))
    turned = hadamard.restored(encode(hadamard.stored(rows)).at("int4"), None, torch.empty(32, 256))
    others = [column for column in range(256) if column != 7]
    lost = [(made - rows)[:, others].square().mean() for made in (plain, turned)]
    assert lost[1] < 0.5 * lost[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(KINDS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_backend_gives_the_same_bits(
    tokens: int, columns: int, kind: torch.dtype, before: bool, after: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns + 3, generator=draw)[:, :columns].to(kind)
    first = torch.randn(columns, generator=draw).exp() if before else None
    last = torch.randn(columns, generator=draw).exp() if after else None
    want = REFERENCE.hadamard(x, first, last)
    for isa in build.instruction_sets():
        for threads in (1, 2):
            assert torch.equal(CpuKernels(isa, threads).hadamard(x, first, last), want), isa
    assert torch.equal(REFERENCE.hadamard(x[:1], first, last), want[:1])


def test_many_tokens_are_shared_among_threads_to_the_bit() -> None:
    x = torch.randn(600, 576)
    made = CpuKernels(threads=2).hadamard(x)
    assert torch.equal(made, hadamard.transform(x))
    assert torch.equal(made[-1:], CpuKernels(threads=1).hadamard(x[-1:]))


def test_rows_come_back_within_a_bounded_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, factors = torch.randn(70, 200), torch.rand(200) + 0.5
    coded = encode(hadamard.stored(rows, factors), 32)
    whole = hadamard.restored(coded, factors, torch.empty(70, 200))
    assert (whole - rows).abs().max() < 0.1
    monkeypatch.setattr(hadamard, "DECODE_SCRATCH_BYTES", 24 * 200 * 7)
    assert torch.equal(hadamard.restored(coded, factors, torch.empty(70, 200)), whole)
    half = hadamard.restored(coded, factors, torch.empty(200, 70, dtype=torch.bfloat16).T)
    assert torch.equal(half, whole.bfloat16())


def test_bytes_of_format_2_are_frozen() -> None:
    """Stores that are on disks were made so: another digest is another format, and needs another version number."""
    place = torch.arange(3 * 200).view(3, 200)
    rows = ((place * 7919) % 2003 - 1001).float() / 1024
    factors = 0.5 + (torch.arange(200) % 7).float() / 8
    coded = encode(hadamard.stored(rows, factors), 64)
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in (*coded.planes, coded.scales))
    assert hashlib.sha256(content).hexdigest() == "f7de3128fc17d9da1ad3e35e5a074cee71e295430231ffd74a98ebb92d96f1c8"
