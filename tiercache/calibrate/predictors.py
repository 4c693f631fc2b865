"""Low-rank predictors of importance from a block's input: trained on part of a text, judged on the rest of it.

Each block has one for itself, and one for the block behind it, whose planes could be fetched early by it. As many
blocks are sampled in one walk through the text as a bound of memory allows. Knows blocks and tensors.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiercache.calibrate.collect import watching
from tiercache.calibrate.journal import Journal
from tiercache.calibrate.sums import HALVES
from tiercache.model.importance import recall
from tiercache.model.mixed import MixedBlock, Seen

TOKENS = 4096
_SAMPLED_BYTES = 512 << 20
_TRAINED = 0.75  # of the tokens; the others judge
PREDICTED = ("own", "ahead")


def train_predictor(
    x: Tensor, truth: Tensor, *, rank: int, share: float = 0.5, steps: int = 400, batch: int = 256, seed: int = 0
) -> nn.Module:
    """Fit a low-rank predictor of which neurons are among the most important `share` (Deja Vu, arXiv 2310.17157,
    section 3): x [tokens, features] -> scores [tokens, neurons], the larger, the likelier.

    `truth` is the importance [tokens, neurons]; `steps` and `batch` are Adam's; `seed` is of the first weights and of
    the batches.
    """
    count = max(1, round(share * truth.shape[1]))
    wanted = torch.zeros_like(truth, dtype=torch.float32).scatter_(1, truth.topk(count, dim=1).indices, 1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inward, outward = nn.Linear(x.shape[1], rank, bias=False), nn.Linear(rank, truth.shape[1])
    made = nn.Sequential(OrderedDict(inward=inward, relu=nn.ReLU(), outward=outward))
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    scale = x.float().std().clamp_min(1e-6)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
            loss = nn.functional.binary_cross_entropy_with_logits(made(x[rows].float() / scale), wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        inward.weight /= scale
    return made.eval().requires_grad_(False)


def train(
    model: Any,
    norms: np.ndarray,
    windows: Sequence[Tensor],
    *,
    rank: int,
    journal: Journal,
    after: Callable[[], None],
) -> None:
    """Train what the journal does not have yet; each block is one step of it."""
    most = max(2, TOKENS // len(windows[0]))  # windows evenly over the text that hold as many tokens
    sample = windows[:: -(-len(windows) // most)]
    tokens = sum(map(len, sample))
    blocks: Sequence[MixedBlock] = model.tiercache.mixed.blocks
    each = tokens * 4 * (blocks[0].planes.block.columns + norms.shape[1])
    together = max(1, _SAMPLED_BYTES // each - 1)  # beside them the one behind, to be looked ahead to
    missing = [place for place in range(len(blocks)) if journal.plain(f"predicted/{place}") is None]
    while missing:
        here = missing[:together]
        wanted = {*here, *(place + 1 for place in here if place + 1 < len(blocks))}
        inputs, truths = _gather(model, norms, sample, wanted, after)
        for place in here:
            arrays, found = _fit(inputs[place], [truths[place], truths.get(place + 1)], rank)
            journal.put(plain={f"predicted/{place}": found}, arrays={f"predictor/{place}": arrays})
        missing = missing[together:]


def _gather(
    model: Any, norms: np.ndarray, sample: Sequence[Tensor], wanted: set[int], after: Callable[[], None]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Inputs and importance of some blocks: [tokens, features], [tokens, neurons]."""
    inputs: dict[int, list[Tensor]] = {place: [] for place in wanted}
    truths: dict[int, list[Tensor]] = {place: [] for place in wanted}

    def see(place: int, seen: Seen) -> None:
        if place in wanted:
            inputs[place].append(seen.x.detach().float().cpu())
            truths[place].append(seen.hidden.float().abs().cpu() * torch.from_numpy(norms[place]).float())

    for window in sample:
        with watching(model, see):
            model(input_ids=window[None].to(model.device), use_cache=False)
        after()
    return {place: torch.cat(inputs[place]) for place in wanted}, {place: torch.cat(truths[place]) for place in wanted}


def _fit(x: Tensor, truths: Sequence[Tensor | None], rank: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Predictors of a block and of the one behind it: their weights, and their recall on tokens they have not seen."""
    seen = max(1, int(_TRAINED * len(x)))
    arrays: dict[str, np.ndarray] = {}
    found: dict[str, Any] = {}
    for name, truth in zip(PREDICTED, truths, strict=True):
        if truth is None:
            continue
        predictor = train_predictor(x[:seen], truth[:seen], rank=rank)
        for key, value in predictor.state_dict().items():
            arrays[f"{name}/{key}"] = value.numpy()
        guess = predictor(x[seen:])
        found[name] = [recall(guess, truth[seen:], half) for half in HALVES]
    return arrays, found
