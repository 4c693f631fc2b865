"""Prompts to draft after: windows of a text file, or of Python's own library, none of them twice.

Every text is written after a prompt of its own: drafters remember what they saw, and one that meets the same text
again looks better than it is. Knows files and a tokenizer; no weights.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import transformers

from tiercache.errors import StoreError, UsageError, permissions_named

# Files that come with Python everywhere, and which the bundled model was not trained on.
_LIBRARY = ("asyncio/locks.py", "multiprocessing/spawn.py", "pty.py", "multiprocessing/popen_spawn_win32.py")


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
        """Cut `count` prompts of `tokens` tokens that do not overlap.

        Args:
            folder: with the tokenizer; where that begins texts with a token of its own, each prompt has it as well.
            text: a UTF-8 file; None for some of Python's library.

        Raises:
            UsageError: no such text, or one that is too short.
            StoreError: there is no tokenizer.
        """
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise StoreError(f"no tokenizer can be read from {folder}; put its files there ({reason})") from error
        root = Path(sysconfig.get_path("stdlib"))
        files = [text] if text is not None else [root / name for name in _LIBRARY if (root / name).is_file()]
        texts = [tokenizer(_content(file), add_special_tokens=False, verbose=False)["input_ids"] for file in files]
        found = [window for ids in texts for window in range(len(ids) // tokens)]
        if len(found) < count:
            raise UsageError(
                f"{text or root} holds {len(found)} prompts of {tokens} tokens, {count} are needed (one for each seed "
                "and prompt, and one to warm up); name a longer --text, or ask for fewer or shorter ones"
            )
        begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        ids = tuple((*begin, *window) for window in _spread(texts, count, tokens))
        return cls("Python's own library" if text is None else str(text), ids)


def _spread(texts: list[list[int]], count: int, tokens: int) -> list[list[int]]:
    """Windows by turns from each text, as far apart within it as may be."""
    rooms = [len(text) // tokens for text in texts]
    taken = [0] * len(texts)
    while sum(taken) < count:
        for place, room in enumerate(rooms):
            taken[place] += taken[place] < room and sum(taken) < count
    windows = []
    for turn in range(max(taken)):
        for text, room, all_of in zip(texts, rooms, taken, strict=True):
            if turn < all_of:
                start = (2 * turn + 1) * room // (2 * all_of) * tokens
                windows.append(text[start : start + tokens])
    return windows


def _content(file: Path) -> str:
    if not file.is_file():
        raise UsageError(f"{file} is {'a folder' if file.is_dir() else 'not there'}; name a text file")
    with permissions_named(file):
        content = file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text (byte {error.start}); save it as UTF-8, or name another") from error
