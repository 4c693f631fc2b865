"""How long a connection may keep silent, and how many are open: uvicorn's own limits bound neither.

uvicorn waits for ever for a first request, and refuses every request while many connections are open. Here a silent
connection is closed, and where too many are open the one that has been silent longest gives way to the newest.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 256  # at once
IDLE_S = 30.0  # until a connection over which nothing comes is closed


class Connection(H11Protocol):
    """One connection.

    Attributes:
        heard_s: when something came last, by the loop's clock.
    """

    heard_s = 0.0
    _silence: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn: a request, or the rest of one, is still to come."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open."""
        super().connection_made(transport)
        self._listen()
        if len(self.connections) > CONNECTIONS:
            open_ones = [one for one in self.connections if isinstance(one, Connection)]
            silent = [one for one in open_ones if one.waits and not one.transport.is_closing()]
            min(silent, key=lambda one: one.heard_s).transport.close()  # this one is among them

    def data_received(self, data: bytes) -> None:
        """Something came."""
        self._listen()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)

    def _listen(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self.heard_s = self.loop.time()
        self._silence = self.loop.call_later(IDLE_S, self._give_up)

    def _give_up(self) -> None:
        if self.waits:  # else an answer is under way, and uvicorn's timer begins after it
            self.transport.close()
