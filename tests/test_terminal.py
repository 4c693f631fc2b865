"""The terminal as people use it: rows while work goes on, whole text, Ctrl-C, and a conversation."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import transformers
from terminals import CTRL_C, CTRL_D, MAIN, Terminal
from test_cli import call, data, refused, save_model, save_tokenizer

from tiercache.commands import answering
from tiercache.commands.answering import _View
from tiercache.commands.base import _by_option
from tiercache.commands.interrupts import Interrupts
from tiercache.commands.running import PICO
from tiercache.generation.answer import PassProgress, Piece

PROMPT = "def read_lines(path):"


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with a chat template: messages, one a line."""
    folder = shutil.copytree(PICO, tmp_path_factory.mktemp("terminal") / "pico")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A model and a link that makes each of its layers take a quarter of a second."""
    folder = tmp_path_factory.mktemp("slow") / "checkpoint"
    save_model(folder, hidden=256, layers=6)
    save_tokenizer(folder, chats=True)
    return folder, "--context", 128, "--hbm", "5.2MiB", "--link-gbps", 0.01


def plainly(shown: str) -> str:
    """Without what moves the cursor or ends a line."""
    return " ".join(re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown).split())


def test_rows_until_the_text_comes_and_then_whole_text() -> None:
    text = data(call("run", "--max-new-tokens", 24, "--json"))["text"]
    with Terminal("run", "--max-new-tokens", 24) as terminal:
        assert terminal.end() == 0
        before, whole, after = terminal.shown.replace("\r\n", "\n").partition(text + "\n")
    assert whole
    assert "loading torch and transformers: 0 s so far" in before or "loading torch and transformers: 1 s" in before
    assert "prompt as it is" in before
    assert "\x1b" not in after  # nothing is drawn again behind the text
    assert "tokens/s; kernels" in after
    assert "a token moved: SSD 0 B, DRAM 10.0 MiB" in after


def test_a_live_line_beside_text_that_goes_elsewhere(tmp_path: Path) -> None:
    options = ("--max-new-tokens", 200, "--drafter", "ngram")
    with (tmp_path / "text").open("w") as out, Terminal("run", *options, stdout=out) as terminal:
        assert terminal.end() == 0
    pace = r"answer: \d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens a pass; a token moved: SSD [^,]+, DRAM \S+ [KM]iB"
    assert re.search(pace, plainly(terminal.shown))
    assert (tmp_path / "text").read_text().strip()


def test_a_pipe_for_both_gets_lines_and_whole_text(slow: tuple[object, ...]) -> None:
    code = f"from tiercache import display; display.FIRST_S = display.EVERY_S = 0.2\n{MAIN}"
    options = [*map(str, slow), "--raw", "--prompt", PROMPT, "--max-new-tokens", "1"]
    command = [sys.executable, "-c", code, "run", *options]
    both = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, timeout=120).stdout
    shown = both.decode(errors="replace")
    assert shown.startswith("loading torch and transformers: ")
    assert "\nopening the model: " in shown
    assert "\nprefill: layer 4 of 6, 21 tokens\n" in shown
    assert data(call("run", *options, "--json"))["text"] in shown


def test_a_conversation_until_ctrl_c(chatting: Path) -> None:
    with Terminal("chat", chatting, "--max-new-tokens", 8) as terminal:
        assert "/help lists commands" in plainly(terminal.until("\n> "))
        terminal.type(f"{PROMPT}\n")
        assert "tokens/s; a token moved: SSD " in plainly(terminal.until("\n> "))
        terminal.type("/hlp\x1b[D\x1b[De\n")  # back by one letter, as only a line editor goes
        assert "forget the conversation" in plainly(terminal.until("\n> "))
        terminal.type("return\n")
        assert "of them kept from the turn before" in plainly(terminal.until("\n> "))
        terminal.type("/stats\n")
        assert "turns: 2; " in plainly(terminal.until("\n> "))
        terminal.type("/reset\n")
        assert "begins anew" in plainly(terminal.until("\n> "))
        terminal.type("/frob\n")
        assert "no command /frob" in plainly(terminal.until("\n> "))
        terminal.type(f"{PROMPT}\n")
        assert "kept from" not in plainly(terminal.until("\n> "))
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.until_asleep()
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(chatting: Path) -> None:
    with Terminal("chat", chatting, "--max-new-tokens", 450) as terminal:
        terminal.until("\n> ")
        terminal.type(f"{PROMPT}\n")
        terminal.until("\x1b[?25h")  # the row is gone: text comes
        terminal.until("    ")
        terminal.type(CTRL_C)
        shown = plainly(terminal.until("\n> "))
        assert " stopped " in shown
        written = int(re.findall(r"(\d+) written", shown)[-1])
        assert 0 < written < 450
        terminal.type("/stats\n")
        assert "turns: 1; " in plainly(terminal.until("\n> "))
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_a_second_ctrl_c_does_not_wait_for_the_layer(slow: tuple[object, ...]) -> None:
    with Terminal("chat", *slow, "--link-gbps", 0.0002) as terminal:
        terminal.until("\n> ")
        terminal.type("hello\n")
        terminal.until("prefill: layer 1 of 6, ")
        terminal.type(CTRL_C)
        terminal.until("stopping; Ctrl-C again ends the program")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert "interrupted" in terminal.shown
        assert "Traceback" not in terminal.shown


def test_interrupts_are_given_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's are ignored
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.stopped
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupts.stopped
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(Interrupts().__enter__().stopped))  # where no signal comes
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_pipe_is_a_line_a_turn(chatting: Path) -> None:
    options = ("chat", chatting, "--system", "import os", "--max-new-tokens", 6)
    lines = f"{PROMPT}\n\nreturn\n/reset\n{PROMPT}\n"
    first, second, third = map(json.loads, call(*options, "--json", given=lines).stdout.splitlines())
    assert [first["schema"], first["turn"], first["finish_reason"]] == ["tiercache.chat/1", 1, "length"]
    told = f"import os\n{PROMPT}\n"
    assert first["tokens"] == _run(told)
    assert second["tokens"] == _run(f"{told}{first['text']}\nreturn\n")
    assert first["prompt_tokens"] < second["reused_tokens"] < second["prompt_tokens"]
    assert third["tokens"] == first["tokens"]
    assert third["reused_tokens"] == 0
    plain = call(*options, given=f"{PROMPT}\n/exit\nho\n")
    assert plain.stdout == first["text"] + "\n"


def _run(prompt: str) -> list[int]:
    tokens: list[int] = data(call("run", "--prompt", prompt, "--max-new-tokens", 6, "--json"))["tokens"]
    return tokens


def test_a_full_context_says_so_and_loses_nothing(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"{PROMPT}\n{'x = 1; ' * 60}\n/stats\nreturn\n"
    piped = call("chat", chatting, "--context", 64, "--max-new-tokens", 8, "--json", given=lines)
    first, error = map(json.loads, piped.stdout.splitlines())
    assert (piped.exit_code, error["error"]) == (3, "ContextExceededError")
    assert "and the context of 64 leaves no room for an answer" in error["message"]
    assert "/reset begins anew; start with --context 128" in error["message"]

    monkeypatch.setattr("tiercache.commands.chatting.goes_on", lambda: True)  # as where somebody types
    typed = call("chat", chatting, "--context", 64, "--max-new-tokens", 8, given=lines)
    assert typed.exit_code == 0
    assert "leaves no room" in typed.stderr
    assert f"turns: 1; {first['prompt_tokens'] + 8} of 64 tokens" in typed.stderr  # the first is kept
    assert "of them kept from the turn before" in typed.stderr  # and gone on from
    cut = call("chat", chatting, "--context", 12, "--max-new-tokens", 64, given=f"{PROMPT}\n")
    assert "the answer was cut, for the context of 12 tokens is full" in cut.stderr
    all_of_it = call("chat", chatting, given="x = 1; " * 300)
    assert "the context of 512 leaves no room" in all_of_it.stderr
    assert "the model was made for no more" in all_of_it.stderr


def test_a_template_that_takes_no_system_text(chatting: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatting, tmp_path / "model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    tokenizer.save_pretrained(folder)
    message = refused(call("chat", folder, "--system", "be", "--json", given="hi\n"), 2, "UsageError")
    assert "System role not supported" in message


def test_an_answer_cannot_steer_the_terminal(
    chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as line:
        view = _View(None, line, stream=True, apart=True, show=False)  # type: ignore[arg-type]
        view.emit(Piece("a\x1b[2Jb\n", ()))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        view.emit(Piece("a\x1b[2Jb\x9b\n", ()))
    assert capsys.readouterr().out == "a\x1b[2Jb\na\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\n"


def test_the_live_line_tells_between_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Meter:
        def first_token(self) -> None:
            pass

        def text(self, tokens: int) -> str:
            told.append(tokens)
            return str(tokens)

    monkeypatch.setattr(answering, "_TELL_EVERY_S", 0.0)
    with ExitStack() as line:
        view = _View(Meter(), line, stream=True, apart=True, show=False)  # type: ignore[arg-type]
        for tokens in (1, 2, 3):
            for layer in range(4):
                view.reached(PassProgress("decode", layer, 4, tokens))
    assert told == [1, 2, 3]  # the bytes of half a pass are no token's


def test_the_library_s_arguments_are_told_as_options() -> None:
    told = _by_option("raise dram= or lower context=; ask for precision='int8', or give bytes_per_token=0.25 or more.")
    assert told == "raise --dram or lower --context; ask for --precision int8, or give --bytes-per-token 0.25 or more."
    assert (
        _by_option("TIERCACHE_HOME=relative, x.store=1 and 2 == 2") == "TIERCACHE_HOME=relative, x.store=1 and 2 == 2"
    )


@pytest.mark.real
def test_a_real_model_answers(real_model: Any) -> None:
    question = "What is the capital of France?"
    result = call("run", real_model.checkpoint, "--prompt", question, "--json")
    assert "Paris" in data(result)["text"]
    assert data(result)["finish_reason"] == "stop"
    raw = call("run", real_model.checkpoint, "--prompt", question, "--raw", "--json")
    assert len(data(raw)["tokens"]) == 1  # as every prompt without its template ended
    turns = call("chat", real_model.checkpoint, "--json", given=f"{question}\nAnd of Spain?\n").stdout.splitlines()
    assert "Paris" in json.loads(turns[0])["text"]
    assert "Madrid" in json.loads(turns[1])["text"]
