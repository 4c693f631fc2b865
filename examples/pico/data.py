"""Python source as a token stream: which files, which are held out, and how they are cut; knows no model."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS = "<|bos|>"
EOS = "<|eos|>"
HELDOUT_SEED = "pico-heldout-7"
HELDOUT_PERCENT = 3

# Not installed with Python, tests (odd encodings, fixtures that are no code), or tables rather than code.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written by the build of this one interpreter


def stdlib_root() -> Path:
    """Folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files() -> list[str]:
    """Relative POSIX paths of the corpus, sorted so that every file system gives the same order."""
    root = stdlib_root()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if _belongs(path))


def _belongs(path: Path) -> bool:
    """Whether a path, relative to the library, is source worth learning from."""
    if not _SKIPPED_FOLDERS.isdisjoint(path.parts):
        return False
    return not any(part.startswith(_SKIPPED_PREFIXES) for part in path.parts)


def is_heldout(relative_path: str) -> bool:
    """Decide by a hash of the path, so that a file keeps its side when the library around it changes."""
    digest = hashlib.sha256(f"{HELDOUT_SEED}/{relative_path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def split_files() -> tuple[list[str], list[str]]:
    """Training files and held-out files."""
    files = stdlib_files()
    return [name for name in files if not is_heldout(name)], [name for name in files if is_heldout(name)]


def read_texts(names: Iterable[str]) -> list[str]:
    """Text of each file that is valid UTF-8 (a few declare an older encoding) and not empty."""
    root, texts = stdlib_root(), []
    for name in names:
        try:
            texts.append((root / name).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown to it. A prompt is given its bos, a document also needs an eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents end to end, each as bos, text, eos: int64 [tokens]."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += [bos, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, eos]
    return torch.tensor(stream, dtype=torch.int64)


class Windows:
    """Training batches as a pure function of their position, so that an interrupted run resumes on the same data.

    Each epoch cuts the stream into windows from a new random offset and visits all of them in a new random
    order. Half of the windows have bos put over their first token: a prompt starts with bos, yet is seldom
    the start of a file.
    """

    def __init__(self, stream: Tensor, window: int, bos: int, seed: int) -> None:
        self._stream, self._window, self._bos, self._seed = stream, window, bos, seed
        self._per_epoch = (len(stream) - window - 1) // window  # one fewer than fit: room for the offset

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows first to first + count: inputs and the tokens that follow them, both [count, window]."""
        rows = torch.stack([self._row(slot) for slot in range(first, first + count)])  # [count, window + 1]
        inputs, targets = rows[:, :-1].clone(), rows[:, 1:]
        generator = torch.Generator().manual_seed(self._seed + 7_919 * (first + 1))
        inputs[torch.rand(count, generator=generator) < 0.5, 0] = self._bos
        return inputs, targets

    def _row(self, slot: int) -> Tensor:
        epoch, position = divmod(slot, self._per_epoch)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        offset = int(torch.randint(self._window, (1,), generator=generator))
        order = torch.randperm(self._per_epoch, generator=generator)
        start = offset + int(order[position]) * self._window
        return self._stream[start : start + self._window + 1]
