"""How the codes of a matrix (`quant.codes`) lie in the bytes of its three planes.

The planes are the upper 3 bits of h, its last bit, and the 4 bits of c. A row is cut into groups of `group` columns.
The last group is padded with codes 0.

Codes of 2 or 4 bits take B = group * bits / 8 bytes per group. Code i of the group lies in byte `i % B` at bit
`bits * (i // B)`: one shift and mask of all bytes yields B consecutive codes. Single bits are packed so that they fall
into the places of 2-bit codes: with the B = group / 4 of these, the bit of code i lies in byte `i % B % (B / 2)` at bit
`2 * (i // B) + (i % B) // (B / 2)`. A row of the first plane is the 2-bit codes of all its groups (the top of h), then
the single bits of all its groups (the next).
"""

from functools import reduce

import torch
from torch import Tensor


def pack(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8 [rows, groups, group]) -> the rows of the three planes, as in the module docstring."""
    upper, middle, lower = pack_fields(h >> 2, 2), pack_bits((h >> 1) & 1), pack_bits(h & 1)
    return torch.cat([upper.flatten(1), middle.flatten(1)], dim=1), lower.flatten(1), pack_fields(c, 4).flatten(1)


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., group] below 2**bits -> bytes [..., group * bits / 8], as in the module docstring."""
    parts = (part << (bits * i) for i, part in enumerate(codes.chunk(8 // bits, dim=-1)))
    return reduce(torch.bitwise_or, parts)


def pack_bits(codes: Tensor) -> Tensor:
    """Single bits [..., group] -> bytes [..., group / 8], in the places of a 2-bit plane."""
    first, second = pack_fields(codes, 2).chunk(2, dim=-1)
    return first | (second << 1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_fields`."""
    return torch.cat([(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-1)


def spread(packed: Tensor) -> Tensor:
    """Bytes of single bits -> those of a 2-bit plane that holds the same codes."""
    return torch.cat([packed & 0x55, (packed >> 1) & 0x55], dim=-1)
