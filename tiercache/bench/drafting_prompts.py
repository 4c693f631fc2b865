"""Prompts to draft after: windows of a text file, or of Python's own library, none of them twice.

Every text is written after a prompt of its own: drafters remember what they saw, and one that meets the same text
again looks better than it is. Knows files and a tokenizer; no weights.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tiercache.errors import UsageError
from tiercache.text import load_tokenizer, read

# Files that come with Python everywhere, and which the bundled model was not trained on.
_LIBRARY = ("asyncio/locks.py", "multiprocessing/spawn.py", "pty.py", "multiprocessing/popen_spawn_win32.py")
_ALL = 1 << 40  # tokens of a file, and of a vocabulary


@dataclass(frozen=True)
class Prompts:
    """What is to be continued.

    Attributes:
        source: where it is from.
        ids: of each prompt.
    """

    source: str
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, folder: Path, text: Path | None, count: int, tokens: int) -> "Prompts":
        """Cut `count` prompts of `tokens` tokens that do not overlap, as far apart as may be.

        Args:
            folder: with the tokenizer; where that begins texts with a token of its own, each prompt has it as well.
            text: a UTF-8 file; None for some of Python's library.
            count: of prompts.
            tokens: of each.

        Raises:
            UsageError: no such text, or one that is too short.
            StoreError: there is no tokenizer.
        """
        tokenizer = load_tokenizer(folder)
        root = Path(sysconfig.get_path("stdlib"))
        files = [text] if text is not None else [root / name for name in _LIBRARY if (root / name).is_file()]
        windows: list[tuple[int, ...]] = []
        for file in files:
            found = read(file, tokenizer, tokens=_ALL, vocabulary=_ALL)
            begin = () if found.bos is None else (found.bos,)
            whole = [window for window in found.ids.split(tokens) if len(window) == tokens]
            windows += [(*begin, *window.tolist()) for window in whole]
        if len(windows) < count:
            raise UsageError(
                f"{text or root} holds {len(windows)} prompts of {tokens} tokens, {count} are needed (one for each "
                "seed and prompt, and one to warm up); name a longer --text, or ask for fewer or shorter ones"
            )
        ids = tuple(windows[(2 * place + 1) * len(windows) // (2 * count)] for place in range(count))
        return cls("Python's own library" if text is None else str(text), ids)
