"""The text that calibration sees, cut into windows: a file of the user's, or the package's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tiercache import text as texts
from tiercache.config.options import CALIBRATION_TOKENS
from tiercache.errors import UsageError

OWN = Path(__file__).with_name("calibration.txt")
"""By turns: prose, dialogue and lists written by SmolLM2-135M-Instruct (do not believe them), docstrings of this
package, and its code."""

WINDOW = 512
"""Tokens of a window, or as many as the model has positions."""


@dataclass(frozen=True)
class Corpus:
    """Windows of a calibration text, int64 [windows, tokens], and the file's SHA-256."""

    windows: Tensor
    sha256: str

    @classmethod
    def read(
        cls, file: Path | None, folder: Path, config: transformers.PretrainedConfig, tokens: int = CALIBRATION_TOKENS
    ) -> "Corpus":
        """Tokenize a text, or the package's own, with the tokenizer that lies in a checkpoint's folder.

        At most `tokens` are used, in whole windows. Raises UsageError where there is no such text or not one window in
        it, StoreError where there is no tokenizer, or another model's.
        """
        window = min(WINDOW, texts.positions(config) or WINDOW, tokens)
        if window < 2:
            raise UsageError(f"{tokens} calibration tokens are too few; give some thousands")
        vocabulary = config.get_text_config().vocab_size
        text = texts.read(file or OWN, texts.load_tokenizer(folder), tokens=tokens, vocabulary=vocabulary)
        whole = [some for some in text.windows(window) if len(some) == window]
        if not whole:
            raise UsageError(
                f"{text.file} holds {len(text.ids)} tokens, fewer than one window of {window}; name a longer text"
            )
        return cls(torch.stack(whole), text.sha256)

    def describe(self) -> dict[str, Any]:
        """What a store remembers of it."""
        return {"method": "gptq", "text": self.sha256, "tokens": self.windows.numel()}
