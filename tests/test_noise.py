"""The noise is Gumbel's, and depends on seed, sample, position and token alone."""

import pytest
import torch
from torch import Tensor

from tiercache.draft.noise import GumbelNoise

pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(noise: GumbelNoise, positions: range) -> Tensor:
    """The numbers behind the noise, uniform in (0, 1): [positions, vocabulary]."""
    return torch.stack([noise(position) for position in positions]).double().neg().exp().neg().exp()


def p_of_chi_square(counts: Tensor) -> float:
    """That counts at least so uneven come about where all cells are equally likely."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2), statistic / 2))


def p_of_pairs(first: Tensor, second: Tensor) -> float:
    """That two numbers beside each other are independent."""
    cells = (first * 12).long().clamp(max=11) * 12 + (second * 12).long().clamp(max=11)
    return p_of_chi_square(torch.bincount(cells.flatten(), minlength=144).double())


def test_the_numbers_are_uniform_and_neighbours_independent() -> None:
    found = uniform(GumbelNoise(7, 4096), range(100, 132))
    assert p_of_chi_square(torch.histc(found, 200, 0, 1)) > 1e-4
    assert p_of_pairs(found[:, :-1], found[:, 1:]) > 1e-4  # tokens
    assert p_of_pairs(found[:-1], found[1:]) > 1e-4  # positions
    others = [uniform(GumbelNoise(seed, 4096), range(32)) for seed in (7, 8)]
    assert p_of_pairs(*others) > 1e-4


def test_the_tests_of_chance_can_fail() -> None:
    found = uniform(GumbelNoise(7, 4096), range(8))
    assert p_of_chi_square(torch.histc(found**1.1, 200, 0, 1)) < 1e-4
    assert p_of_pairs(found, found) < 1e-4


def test_it_depends_on_seed_position_and_token_alone() -> None:
    forwards, backwards = GumbelNoise(3, 50), GumbelNoise(3, 80)
    seen = {position: forwards(position) for position in range(200)}  # more than are kept
    for position in reversed(range(200)):
        assert torch.equal(backwards(position)[:50], seen[position])
        assert torch.equal(forwards(position), seen[position])
    for other in (GumbelNoise(4, 50), GumbelNoise(-3, 50), GumbelNoise(1 << 64, 50)):
        assert not torch.isclose(other(0), seen[0]).any()
    assert torch.equal(GumbelNoise(3 - (1 << 64), 50)(0), seen[0])  # seeds are taken modulo 2**64
    assert not torch.isclose(seen[0], seen[1]).any()


def test_the_highest_of_scores_and_noise_is_a_sample() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    noise = GumbelNoise(11, 5)
    taken = torch.stack([p.log() + noise(position) for position in range(4000)]).argmax(-1)
    counts, expected = torch.bincount(taken, minlength=5), 4000 * p
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(2.0), statistic / 2) > 1e-4
