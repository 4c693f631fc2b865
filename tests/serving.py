"""Servers of tests: real sockets, on a free port, in a thread of the test's process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from fake_generator import FakeGenerator
from test_cli import save_tokenizer

from tiercache.serve.app import Server
from tiercache.serve.listener import Limits, Listener
from tiercache.serve.served import Defaults, Served

NAME = "fake"
_LIMITS = Limits()


class Running:
    """A server that runs."""

    def __init__(
        self, listener: Listener, server: Server, generator: FakeGenerator, lines: list[tuple[Any, ...]]
    ) -> None:
        self.listener, self.url, self.server, self.generator, self.lines = (
            listener,
            listener.url,
            server,
            generator,
            lines,
        )


def byte_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, with a chat template that refuses two messages of one role in turn."""
    tokenizer = save_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if not loop.first and loop.previtem.role == message.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message.role }}]{{ message.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


@contextmanager
def running(
    tokenizer: Any,
    *,
    layer_s: float = 0.0,
    waiting: int = 8,
    max_body: int = 1 << 20,
    heartbeat_s: float = 2.0,
    max_tokens: int = 256,
    defaults: Defaults | None = None,
) -> Iterator[Running]:
    """A server before a fake generator; its key is that of the environment."""
    generator = FakeGenerator(tokenizer, layer_s=layer_s)
    sampled, now = defaults or Defaults(), int(time.time())
    served = Served(NAME, generator, tokenizer, len(tokenizer), generator.statistics, sampled, max_tokens, now)
    server = Server(served, waiting=waiting, heartbeat_s=heartbeat_s)
    listener, ready, lines = Listener("127.0.0.1", 0), threading.Event(), []

    def log(*line: Any) -> None:
        lines.append(line)

    with _in_thread(listener, partial(listener.run, server, max_body, ready=ready.set, log=log)):
        assert ready.wait(30)
        yield Running(listener, server, generator, lines)


@contextmanager
def serving(model: Any, tokenizer: Any, limits: Limits = _LIMITS) -> Iterator[str]:
    """The address of a server before an offloaded model."""
    listener, ready = Listener("127.0.0.1", 0), threading.Event()
    with _in_thread(listener, partial(listener.serve, model, tokenizer, NAME, limits, ready=ready.set, log=print)):
        assert ready.wait(30)
        yield listener.url


@contextmanager
def _in_thread(listener: Listener, run: Callable[[], None]) -> Iterator[None]:
    """Runs it in a thread, and ends it as a signal would."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        listener.stop()
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
