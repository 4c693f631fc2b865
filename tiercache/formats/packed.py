"""What the formats have in common: a source that is packed, and the folder that describes it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import transformers

from tiercache.store.reader import PackedTensor, StoredTensor


class PackedSource(ABC):
    """A checkpoint whose weights are quantised already.

    Attributes:
        place: the file or folder that the user named.
        title: its name, for folders that are made of it.
    """

    place: Path
    title: str

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of its settings, its small files and samples of its tensors."""

    @abstractmethod
    def describe(self, folder: Path) -> None:
        """Write what a plain checkpoint's folder holds besides weights and tokenizer: config.json and the like."""

    @abstractmethod
    def describe_tokenizer(self, folder: Path, kept_in: Path) -> None:
        """Write the tokenizer's files; where they cannot be had, say why, and what to do with the folder `kept_in`."""

    @abstractmethod
    def tensors(self, model: transformers.PreTrainedModel) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint, by a name that a plain checkpoint would have; in the dtype of `model`."""


def loss(tensors: Iterable[StoredTensor]) -> str:
    """What quantising has cost already, in words; empty where nothing was quantised."""
    stored: dict[str, int] = {}
    weights = 0
    for tensor in tensors:
        if isinstance(tensor, PackedTensor) and tensor.encoding:
            nbytes = sum(part.nbytes for part in tensor.parts().values())
            stored[tensor.encoding] = stored.get(tensor.encoding, 0) + nbytes
            weights += tensor.nbytes // tensor.itemsize
    if not stored:
        return ""
    named = " and ".join(sorted(stored, key=lambda encoding: -stored[encoding]))
    bits = 8 * sum(stored.values()) / weights
    return f"weights were quantized to {named} already ({bits:.1f} bits a weight); tiercache keeps what is left"
