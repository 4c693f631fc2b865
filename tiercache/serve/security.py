"""Who may ask: the key, the names that this server goes by, and the pages that may call it.

Without a key the server listens on this machine alone. A page of another site that is open in a browser here could
still send it requests, so what names another host (DNS rebinding) or comes from another origin is turned away.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

from tiercache.config import environment
from tiercache.errors import UsageError
from tiercache.serve.refusal import RefusalError

KEY_VARIABLE = "TIERCACHE_API_KEY"
OPEN_PATHS = ("/", "/health")  # they tell nothing about anybody; the page asks for the key
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class AccessPolicy:
    """Checks each request's headers.

    Args:
        host: the address that the server listens on.
        key: what requests must carry; None for no key.
        names: further names that requests may call this server by.

    Raises:
        UsageError: a key that no header can carry, or none for an address that other machines reach.
    """

    def __init__(self, host: str, key: str | None, names: tuple[str, ...] = ()) -> None:
        if key is not None and not (key.isascii() and key.strip() == key != ""):
            raise UsageError(f"{KEY_VARIABLE} is empty or no plain ASCII; put a key there, or unset it")
        if key is None and not is_loopback(host):
            raise UsageError(
                f"other machines reach {host}, so a key is needed; put one in the environment variable {KEY_VARIABLE}, "
                "or leave --host out"
            )
        self._digest = None if key is None else _digest(key.encode())
        # Who has the key has it from its owner, and a browser sends it to no other site: any name will do then.
        self._names = None if not is_loopback(host) else {*_LOCAL_NAMES, _name(host), *map(_name, names)}

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Let a request pass.

        Args:
            path: what is asked for.
            headers: by name in small letters.

        Raises:
            RefusalError: 403 for another host or origin, 401 for a key that is missing or wrong.
        """
        host = headers.get("host", "")
        if self._names is not None and _name(host) not in self._names:
            raise RefusalError(403, "this server does not go by the name in the Host header; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise RefusalError(403, "pages of other origins may not call this server")
        if self._digest is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests are of one length, so the time tells nothing of the key's.
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip().encode()), self._digest):
            raise RefusalError(
                401,
                "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def key_of_environment() -> str | None:
    """The key; None where there is none."""
    return environment.value(KEY_VARIABLE)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _name(host: str) -> str:
    """The name of `name:port` or `[address]:port`, and of either without a port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    if host.count(":") > 1:  # an address of IPv6, as --host and --allow-host take it
        return host.lower()
    return host.partition(":")[0].lower()
