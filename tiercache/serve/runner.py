"""Runs the app until a signal ends it. Beside `connection`, the one file that knows uvicorn and sockets."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tiercache.errors import EnvironmentUnsupportedError
from tiercache.serve import connection
from tiercache.serve.queue import GenerationQueue

_SHUTDOWN_S = 30  # that answers under way have to tell their clients that it ends


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, on which nobody listens yet; port 0 takes a free one.

    Raises:
        EnvironmentUnsupportedError: the address is not this machine's, or is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its number, or asyncio leaves Nagle's algorithm on, which holds small writes back for 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]"), port))
    except OSError as error:
        made.close()
        raise EnvironmentUnsupportedError(
            f"nobody can listen on {host}, port {port} ({error.strerror or error}); give another --port or --host"
        ) from error
    return made


class Runner:
    """Serves an app.

    Args:
        app: what answers.
        made: the socket.
        queue: ends with the server.
        ready: is called once requests are taken.
    """

    def __init__(self, app: ASGIApp, made: socket.socket, queue: GenerationQueue, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=connection.Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(connection.IDLE_S),
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        self._server, self._socket, self._queue = _Server(config, queue, ready), made, queue

    def run(self) -> None:
        """Serve until `stop`, or SIGTERM, or until Ctrl-C, which is raised again when all is ended.

        New connections are refused then, the answer under way is broken off at its next layer, and those who wait are
        told. A second signal does not wait for clients to read that.
        """
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._queue.close()
            self._queue.join()
        if self._server.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """End it as SIGTERM does; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's, which ends the queue with the server, and leaves the signals to the caller."""

    def __init__(self, config: uvicorn.Config, queue: GenerationQueue, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._queue, self._ready = queue, ready
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # uvicorn's own raises a signal again, which would end the process
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():  # which alone may listen to them
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, self._end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.interrupted |= number == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True
