"""The server before and behind its model: what can be refused at once is refused before a model is loaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiercache.generation.generator import TextGenerator
from tiercache.serve.app import Server
from tiercache.serve.middleware import Log, Middleware
from tiercache.serve.runner import Runner, bind
from tiercache.serve.security import AccessPolicy, key_of_environment
from tiercache.serve.served import Defaults, Served

_PATHS = ("/", "/health", "/metrics", "/stats", "/v1/models", "/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        waiting: requests that wait, at most.
        max_tokens: new tokens of an answer; None for as many as the context holds.
        max_body: bytes of a request.
    """

    waiting: int = 8
    max_tokens: int | None = None
    max_body: int = 4 << 20


class Listener:
    """An address that is taken, and who may call there.

    Args:
        host: the address; any that other machines reach needs a key in the environment.
        port: 0 takes a free one.
        names: further names that requests may call this server by.

    Attributes:
        url: where it listens.

    Raises:
        UsageError: an address that needs a key, without one.
        EnvironmentUnsupportedError: the address is taken, or not this machine's.
    """

    def __init__(self, host: str, port: int, names: tuple[str, ...] = ()) -> None:
        self._access = AccessPolicy(host, key_of_environment(), names)
        self._socket = bind(host, port)
        self._runner: Runner | None = None
        shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"

    def serve(
        self, model: Any, tokenizer: Any, name: str, limits: Limits, *, ready: Callable[[], None], log: Log
    ) -> None:
        """Serve an offloaded model until a signal ends it.

        Args:
            model, tokenizer: from `tiercache.offload`, and its own.
            name: what requests call it.
            limits: what they may ask for.
            ready: is called once requests are taken.
            log: is told of each answer.

        Raises:
            KeyboardInterrupt: Ctrl-C ended it.
        """
        generator = TextGenerator(model, tokenizer)
        served = Served(
            name,
            generator,
            tokenizer,
            model.config.get_text_config().vocab_size,
            lambda: model.tiercache.stats().to_dict(),
            Defaults.of_checkpoint(model.generation_config),
            generator.context if limits.max_tokens is None else limits.max_tokens,
            int(time.time()),
        )
        self.run(Server(served, waiting=limits.waiting), limits.max_body, ready=ready, log=log)

    def run(self, server: Server, max_body: int, *, ready: Callable[[], None], log: Log) -> None:
        """Serve whatever answers; as `serve`."""

        def counted(method: str, path: str, status: int, seconds: float) -> None:
            server.metrics.count_request(path if path in _PATHS else "other", status)
            log(method, path, status, seconds)

        middleware = Middleware(server.app, self._access, server.queue.check_room, max_body, counted)
        self._runner = Runner(middleware, self._socket, server.queue, ready)
        self._runner.run()

    def close(self) -> None:
        """Give the address back; a server that has run has done so."""
        self._socket.close()

    def stop(self) -> None:
        """End a server that runs, as SIGTERM does; from any thread."""
        if self._runner is not None:
            self._runner.stop()
