"""Has answers written, and tells meanwhile how far they are.

A line that is drawn again and again cannot stand where text streams to: it would tear the text apart. So where standard
output and standard error are the same terminal, file or pipe, the line stands until the first text comes, and what it
would have said follows the answer. Elsewhere it stands until the end.

A model may write any character. On a terminal those that steer it are replaced, so that no answer moves the cursor.
"""

import io
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tiercache.commands.answer_figures import AnswerMeter
from tiercache.commands.interrupts import Interrupts
from tiercache.generation.answer import Answer, PassProgress, Piece
from tiercache.generation.generator import TextGenerator
from tiercache.generation.request import GenerationRequest
from tiercache.progress import step

_STEERING = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_TELL_EVERY_S = 0.5  # counting up the statistics takes a while itself


@dataclass(frozen=True)
class Told:
    """An answer, and what it took as plain data."""

    answer: Answer
    figures: dict[str, Any]

    @property
    def cancelled(self) -> bool:
        """Ctrl-C ended it."""
        return self.answer.finish_reason == "cancelled"


class Speaker:
    """Answers with one offloaded model.

    Args:
        model: from `tiercache.offload`.
        tokenizer: its own.
        stream: text goes to standard output as it comes.
        show: False tells nothing meanwhile.

    Attributes:
        generator: what writes.
    """

    def __init__(self, model: Any, tokenizer: Any, *, stream: bool, show: bool | None) -> None:
        self.generator = TextGenerator(model, tokenizer)
        self._handle, self._stream, self._show = model.tiercache, stream, show
        self._apart = not (stream and _same_place())

    def answer(self, request: GenerationRequest, interrupts: Interrupts) -> Told:
        """The answer; streamed text ends with a line's end. The first interrupt stops it."""
        meter = AnswerMeter(self._handle)
        with ExitStack() as line:
            view = _View(meter, line, stream=self._stream, apart=self._apart, show=self._show)
            interrupts.heard = view.stopping
            answer = self.generator.generate(
                request, emit=view.emit, cancelled=lambda: interrupts.stopped, progress=view.reached
            )
        if self._stream:
            print(flush=True)
        return Told(answer, meter.figures(len(answer.tokens), answer.first_token_s, answer.seconds))


class _View:
    """What is seen of one answer while it is written.

    Args:
        meter: of the answer.
        line: closes the live line.
        stream: text goes to standard output.
        apart: the live line is not where the text is.
        show: as of `progress.step`.
    """

    def __init__(self, meter: AnswerMeter, line: ExitStack, *, stream: bool, apart: bool, show: bool | None) -> None:
        self._meter, self._line, self._stream, self._apart, self._show = meter, line, stream, apart, show
        self._tell = line.enter_context(step("prefill", show=show))
        self._decodes, self._told_at = False, 0.0

    def emit(self, piece: Piece) -> None:
        """Text has come."""
        if self._stream and piece.text:
            if not self._apart:
                self._line.close()
            print(piece.text.translate(_STEERING) if sys.stdout.isatty() else piece.text, end="", flush=True)

    def stopping(self) -> None:
        """The answer is to end at the next layer, which may take a while."""
        self._tell("stopping; Ctrl-C again ends the program")

    def reached(self, at: PassProgress) -> None:
        """A layer of a pass begins."""
        if at.phase == "prefill":
            self._tell(f"layer {at.layer + 1} of {at.layers}, {at.tokens} tokens")
            return
        if not self._decodes:
            self._decodes = True
            self._meter.first_token()
            if self._apart:
                self._line.close()
                self._tell = self._line.enter_context(step("answer", show=self._show))
        now = time.monotonic()
        # Between two passes alone: the bytes of one that is under way are no finished token's.
        if self._apart and at.layer == 0 and now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            self._tell(self._meter.text(at.tokens))


def _same_place() -> bool:
    """Whether standard output and standard error are one terminal, file or pipe."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (io.UnsupportedOperation, OSError, ValueError):  # one of them is no file at all
        return False
