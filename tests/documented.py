"""What the documentation shows: commands and blocks of Python, as they stand in README.md, docs and examples."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOUSE = Path(__file__).parents[1]
_FILES = (HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md")), HOUSE / "examples" / "README.md")
PAGES = tuple(str(path.relative_to(HOUSE)) for path in _FILES)
SHELLS = ("", "console", "sh", "shell", "bash")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:tiercache|tiercache-profile|make|pytest|pip|python) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: behind the fence.
        text: between the fences.
        line: of the page, where it begins.
    """

    language: str
    text: str
    line: int

    def commands(self) -> Iterator[list[str]]:
        """Its commands, word by word: comments are left out, and so is what a console answers."""
        text = self.text.replace("\\\n", " ")
        lines = text.splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while "&&" in words:
                place = words.index("&&")
                yield words[:place]
                words = words[place + 1 :]
            if words:
                yield words  # what is piped into it, and "|", come first

    def answers(self) -> list[tuple[list[str], list[str]]]:
        """Of a console: each command that has an answer, and its lines."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:] if self.language == "console" else []
        found = [(shlex.split(part.splitlines()[0]), part.splitlines()[1:]) for part in parts]
        return [each for each in found if each[1]]


def text_of(page: str) -> str:
    """A page."""
    return (HOUSE / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = text_of(page)
    return [Block(found[1], found[2], text[: found.start()].count("\n") + 1) for found in _FENCED.finditer(text)]


def python(page: str, start: str) -> str:
    """The one block of Python of a page that contains `start`."""
    (found,) = [block.text for block in blocks(page) if block.language == "python" and start in block.text]
    return found


def mentioned(page: str) -> list[list[str]]:
    """Commands that are named within a sentence."""
    prose = _FENCED.sub("", text_of(page))
    return [shlex.split(found[1].replace("\n", " ")) for found in _INLINE.finditer(prose)]
