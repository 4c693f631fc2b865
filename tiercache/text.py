"""The text that quality is measured on: a file, its tokens, and the windows they are cut into. Knows no weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tiercache.errors import StoreError, UsageError, permissions_named
from tiercache.progress import note

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
_CHARACTERS_PER_TOKEN = 64  # far more than any tokenizer's mean: what lies behind need not be tokenized


@dataclass(frozen=True)
class Text:
    """The tokens of a file that are used.

    Attributes:
        file: where it lies.
        sha256: of the whole file.
        asked: tokens that were asked for; the file may hold fewer.
        ids: the tokens, int64 [tokens], without a beginning-of-sequence token.
        bos: what the tokenizer puts before a text; None where it puts nothing.
    """

    file: Path
    sha256: str
    asked: int
    ids: Tensor
    bos: int | None

    def windows(self, length: int) -> list[Tensor]:
        """The text cut into windows of `length` tokens that do not overlap, the last as long as it comes.

        The first token of a window is predicted from nothing, so it is not asked for. Where the tokenizer begins a
        text with a token of its own, every window begins with that one, and every token of the text is predicted.
        """
        if self.bos is None:
            return [window for window in self.ids.split(length) if len(window) > 1]
        bos = torch.tensor([self.bos])
        return [torch.cat([bos, window]) for window in self.ids.split(length - 1)]

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {"file": str(self.file), "sha256": self.sha256, "tokens": len(self.ids), "asked": self.asked}


def read(file: Path, tokenizer: Any, *, tokens: int, vocabulary: int) -> Text:
    """The first `tokens` tokens of a file, or all of them where it holds fewer.

    Raises:
        UsageError: there is no such file, it is empty or no UTF-8 text, or too short to predict anything.
        StoreError: the tokenizer is another model's.
    """
    content = _content(file)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text (byte {error.start}); save it as UTF-8, or name another") from error
    if "\0" in text:
        raise UsageError(f"{file} holds zero bytes, so it is no text but binary; name a text file")
    ids, bos = _encode(tokenizer, text[: _CHARACTERS_PER_TOKEN * tokens])
    if len(ids) < tokens:
        ids, bos = _encode(tokenizer, text)
    if len(ids) < 2:
        raise UsageError(f"{file} holds {len(ids)} tokens, and 2 are the least; name a longer text")
    ids = ids[:tokens]
    if max(ids) >= vocabulary:
        raise StoreError(
            f"the tokenizer makes token {max(ids)}, the model knows {vocabulary}: it is another model's; put this "
            "model's tokenizer files in its folder"
        )
    return Text(file, hashlib.sha256(content).hexdigest(), tokens, torch.tensor(ids, dtype=torch.int64), bos)


def note_short(text: Text, *, show: bool | None) -> None:
    """Say it where the file holds fewer tokens than were asked for."""
    if len(text.ids) < text.asked:
        held = f"{text.file} holds {len(text.ids)} tokens, fewer than the {text.asked} asked for"
        note(held, show=show)


def positions(config: transformers.PretrainedConfig) -> int | None:
    """How many tokens the model was made for; None where nothing bounds it."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_window(config: transformers.PretrainedConfig, window: int) -> None:
    """Refuse windows that are longer than the model was made for.

    Raises:
        UsageError: they are.
    """
    most = positions(config)
    if most is not None and window > most:
        raise UsageError(f"--window {window} is longer than the model's {most} positions; give less")


def has_tokenizer(folder: Path) -> bool:
    """Whether files of a tokenizer lie there, readable or not."""
    return any(file.is_file() for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a checkpoint's or store's folder.

    Raises:
        StoreError: there is none.
    """
    if not has_tokenizer(folder):
        # older transformers make an empty tokenizer then, which answers with nothing
        raise StoreError(f"no tokenizer lies in {folder}; put its files there")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a kind that needs a package that is not here
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StoreError(f"no tokenizer can be read from {folder}; put its files there ({reason})") from error


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(f"{file} is {'a folder' if file.is_dir() else 'not there'}; name a text file")
    with permissions_named(file):
        content = file.read_bytes()
    if not content.strip():
        raise UsageError(f"{file} is empty; name a file with text")
    return content


def _encode(tokenizer: Any, text: str) -> tuple[list[int], int | None]:
    """Tokens of the text alone, and the token that the tokenizer puts before a text."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    short = tokenizer(text[:8])["input_ids"]
    bos = tokenizer.bos_token_id
    return bare, bos if bos is not None and short[:1] == [bos] else None
