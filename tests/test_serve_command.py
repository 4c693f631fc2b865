"""`tiercache serve` as a program: where it listens, how it ends, what it refuses before it loads anything; its docs."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_cli import call

from tiercache.text import load_tokenizer

HOUSE = Path(__file__).parents[1]
PICO = HOUSE / "examples" / "pico" / "checkpoint"
DOCS = HOUSE / "docs" / "serving.md"
COMMAND = (sys.executable, "-m", "tiercache", "serve")
SIZES = ("--context", "128", "--logits", "8", "--dram", "1GiB")


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The program, once it says where it listens, and what it says. It is ended if the test has not done so."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=HOUSE,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_it_in_the_middle_of_an_answer(number: signal.Signals, code: int) -> None:
    with started(str(PICO), "--port", "0", "--link-gbps", "0.02", "--hbm", "7MiB", *SIZES) as (process, said):
        assert said == {"schema": "tiercache.serve/1", "url": said["url"], "model": "checkpoint"}
        body = {"prompt": "def f():", "max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{said['url']}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            rest = "\n".join(lines)
        assert "shutting_down" in rest
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert [json.loads(line)["exit_code"] for line in out.splitlines()] == ([code] if code else [])
    assert "is served at" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "TIERCACHE_API_KEY"),
        (("--port", "taken"), 5, "--port"),
        (("--draft-nodes", "3"), 2, "--drafter"),
        (("--max-body", "1"), 2, "--max-body"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERCACHE_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = ["--port", "0", *(port if word == "taken" else word for word in arguments)]
        found = call("serve", PICO, *given)
    assert found.exit_code == code
    assert message in found.stderr


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiercache.serve.listener", None)  # as if a package of it were missing
    found = call("serve", PICO)
    assert found.exit_code == 5
    assert "tiercache[serve]" in found.stderr


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """The bundled model with a chat template."""
    folder = shutil.copytree(PICO, tmp_path / "talker")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for message in messages %}# {{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_every_example_of_the_docs(talker: Path) -> None:
    """As they stand, but for the port that they name, and a toy in place of MODEL."""
    start, *requests = blocks("bash")
    program, command, model, *options = shlex.split(start)
    assert (program, command, model) == ("tiercache", "serve", "MODEL")
    key = "a-key-of-the-test"
    with started(str(talker), *options, "--port", "0", *SIZES, TIERCACHE_API_KEY=key) as (_, said):
        here = {**os.environ, "TIERCACHE_API_KEY": key}
        for block in requests:
            text = block.replace("http://127.0.0.1:8000", said["url"])
            done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, env=here, check=True)
            assert '"error"' not in done.stdout, (block, done.stdout)
            assert done.stdout, (block, done.stderr)
        for block in blocks("python"):
            text = block.replace("http://127.0.0.1:8000", said["url"])
            subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=here, check=True)
