"""Real text that any Python brings, cut into fixed splits: what calibration sees, and what is measured on.

Prose is the language reference as `pydoc` has it, code is the standard library; the instructions are 48 of eight kinds.
Names are fixed, so that the same Python gives the same text; no topic and no module is in both splits.
"""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercache.errors import EnvironmentUnsupportedError

PROSE = {
    "calibration": ("compound", "types", "formatstrings", "string-methods"),
    "heldout": ("execmodel", "comparisons", "typesmapping", "debugger", "assignment"),
}
CODE = {
    "calibration": ("heapq.py", "csv.py", "statistics.py", "fractions.py"),
    # pico was not trained on these either (examples/pico/heldout.txt)
    "heldout": ("asyncio/locks.py", "multiprocessing/spawn.py", "pty.py", "multiprocessing/popen_spawn_win32.py"),
}
INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"
_BLOCK = 4096  # characters of prose, then of code, by turns: the beginning of a calibration text has both


@dataclass(frozen=True)
class Instruction:
    """What somebody asks.

    Attributes:
        kind: one of eight.
        prompt: the user's words.
    """

    kind: str
    prompt: str

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids through the chat template, up to where the answer begins."""
        talk = [{"role": "user", "content": self.prompt}]
        return list(tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"])


def prose(split: str) -> str:
    """English prose: topics of the language reference."""
    from pydoc_data.topics import topics  # half a megabyte, needed here alone

    return "\n\n".join(topics[name].strip() for name in PROSE[split])


def code(split: str) -> str:
    """Python code: modules of the standard library.

    Raises:
        EnvironmentUnsupportedError: this Python comes without their source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if missing := [name for name in CODE[split] if not (folder / name).is_file()]:
        raise EnvironmentUnsupportedError(f"{folder} lacks {', '.join(missing)}; use a Python with its whole library")
    return "\n\n".join((folder / name).read_text(encoding="utf-8").strip() for name in CODE[split])


def calibration() -> str:
    """Prose and code by turns."""
    parts = [prose("calibration"), code("calibration")]
    pieces = [[part[at : at + _BLOCK] for at in range(0, len(part), _BLOCK)] for part in parts]
    return "".join(piece for pair in zip(*pieces, strict=False) for piece in pair)


def instructions(per_kind: int | None = None) -> list[Instruction]:
    """The first `per_kind` instructions of each kind, kinds by turns; None for all."""
    lines = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    kinds: dict[str, list[Instruction]] = {}
    for line in lines:
        found = Instruction(**json.loads(line))
        kinds.setdefault(found.kind, []).append(found)
    most = max(map(len, kinds.values())) if per_kind is None else per_kind
    return [some[place] for place in range(most) for some in kinds.values() if place < len(some)]
