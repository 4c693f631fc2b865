"""One pass over the text in one mode: loss, distance from the reference, speed. Knows an attached model from outside.

The reference's logits lie in a file without a name, which the system takes back whatever ends the process: one model at
a time is open, for a large one cannot be twice. They are kept in the model's own dtype, so nothing is rounded; what is
compared is computed in fp64.
"""

import errno
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tiercache.config.sizes import human
from tiercache.errors import EnvironmentUnsupportedError

_ROWS = 32  # rows of the vocabulary that are compared at a time: in fp64, a few copies of them
_WAY_OUT = "ask for fewer --tokens, or name another --scratch folder"


class KeptLogits:
    """Rows of logits in a file: put in order, taken in the same order, as often as one likes."""

    def __init__(self, file: IO[bytes], way_out: str) -> None:
        self._file, self._way_out = file, way_out
        self._dtype, self._vocabulary = torch.float32, 0

    def put(self, rows: Tensor) -> None:
        """Append rows of logits: [rows, vocabulary]."""
        self._dtype, self._vocabulary = rows.dtype, rows.shape[-1]
        try:
            self._file.write(rows.contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise EnvironmentUnsupportedError(
                f"the disk is full: the reference's logits do not fit; {self._way_out}"
            ) from error

    def rewind(self) -> None:
        """The next `take` is of the first row."""
        self._file.seek(0)

    def take(self, count: int) -> Tensor:
        """The next rows: [count, vocabulary]."""
        rows = torch.empty(count, self._vocabulary, dtype=self._dtype)
        wanted = rows.view(torch.uint8).numpy().data.cast("B")
        if self._file.readinto(wanted) != len(wanted):  # type: ignore[attr-defined]
            raise EnvironmentUnsupportedError("the reference's logits were cut short on disk; look at its health")
        return rows


@contextmanager
def kept_logits(folder: Path, size_bytes: int, way_out: str = _WAY_OUT) -> Iterator[KeptLogits]:
    """Room for logits in `folder`, given back at the end.

    Raises EnvironmentUnsupportedError with the `way_out` where the folder may not be written to, or is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    except OSError as error:
        raise EnvironmentUnsupportedError(f"{folder} cannot be used ({error.strerror}); {way_out}") from error
    with file:
        if size_bytes > free_bytes:
            raise EnvironmentUnsupportedError(
                f"the reference's logits take {human(size_bytes)} on disk, {folder} has {human(free_bytes)} free: "
                f"{size_bytes - free_bytes} bytes are missing; {way_out}"
            )
        yield KeptLogits(file, way_out)


@dataclass
class Score:
    """Sums over predicted tokens; what a logit that is no number has a part in is no number either.

    Attributes:
        tokens: predicted.
        nats: their summed negative log likelihood.
        entropy: summed, of the predictions, in nats.
        kl: summed KL(reference || this) in nats.
        same: how often the likeliest token is the reference's.
    """

    tokens: int = 0
    nats: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Count predicted tokens: logits [rows, vocabulary], targets [rows], reference like logits or None."""
        log_q = logits.double().log_softmax(-1)
        self.tokens += len(targets)
        self.nats -= float(log_q.gather(-1, targets[:, None]).sum())
        self.entropy -= _expected(log_q, log_q)
        if reference is None:  # this is the reference
            self.same += len(targets)
            return
        log_p = reference.double().log_softmax(-1)
        self.kl += _expected(log_p, log_p - log_q)
        self.same += int((reference.argmax(-1) == logits.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """Of the predictions."""
        loss = self.nats / self.tokens
        return math.exp(loss) if loss < 700 else math.inf

    def to_dict(self) -> dict[str, float | None]:
        """Means a token; None for what is not finite, which JSON cannot say."""
        means = {"loss": self.nats / self.tokens, "perplexity": self.perplexity, "kl": self.kl / self.tokens}
        finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
        return {**finite, "top1": self.same / self.tokens}


def _expected(log_p: Tensor, values: Tensor) -> float:
    """Sum of p times the values. 0 log 0 = 0, and a p that is no number stays one that is not `== 0`."""
    p = log_p.exp()
    return float(torch.where(p == 0, 0.0, p * values).sum())


def batches(windows: Sequence[Tensor], size: int) -> list[Tensor]:
    """Windows stacked, `size` at a time, each batch of one length: [batch, window]."""
    last = len(windows) - 1 if len(windows) > 1 and len(windows[-1]) < len(windows[0]) else len(windows)
    whole = [torch.stack(list(windows[start : min(start + size, last)])) for start in range(0, last, size)]
    return whole + [window[None] for window in windows[last:]]


@torch.inference_mode()
def score(
    model: Any,
    inputs: Sequence[Tensor],
    *,
    reference: KeptLogits | None = None,
    keep: KeptLogits | None = None,
    every_token: bool = False,
    after: Callable[[], None] = lambda: None,
) -> Score:
    """Run batches of tokens [batch, window] through an attached model, or any causal language model of transformers.

    Args:
        model: to run.
        inputs: the batches.
        reference: what to compare with; None where this is the reference.
        keep: takes the logits, for later comparisons.
        every_token: choose neurons for each token as in decoding, which a mixed mode does not do in long passes.
        after: called after each batch.
    """
    total = Score()
    if reference is not None:
        reference.rewind()
    for batch in inputs:
        with model.tiercache.every_token() if every_token else nullcontext():
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
        for sequence, wanted in zip(logits, batch[:, 1:], strict=True):
            for some, targets in zip(sequence.split(_ROWS), wanted.split(_ROWS), strict=True):
                rows = some.cpu()
                total.add(rows, targets.cpu(), None if reference is None else reference.take(len(rows)))
                if keep is not None:
                    keep.put(rows)
        after()
    return total


def decoding_speed(model: Any, prompt: Tensor, tokens: int) -> float | None:
    """Tokens a second of greedy decoding behind `prompt` [tokens]; None where none are asked for."""
    if not tokens:
        return None
    ids = prompt[None].to(model.device)
    pad = 0 if model.generation_config.pad_token_id is None else model.generation_config.pad_token_id
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad}
    counts = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(ids, attention_mask=torch.ones_like(ids), **greedy, **counts)
    return float(model.tiercache.stats().tokens_per_s)
