"""The session manager: the pools of one client and its copies, one for each event loop, and what a fork leaves."""

import asyncio
import os
import ssl as _ssl
import threading
import weakref
from collections.abc import Mapping

from ._config import Limits
from ._meta import PoolStats
from ._transport import Pool, Session
from .errors import ConfigurationError


class SessionManager:
    """The pools of one client and its copies, by event loop.

    Args:
        limits: of each pool.
        headers: what every request of the client carries; set once on each session.
        ssl: company certificates, or `None` for the system's.
        session: the caller's own; used as it is and never closed.
    """

    def __init__(
        self,
        limits: Limits,
        headers: Mapping[str, str],
        ssl: _ssl.SSLContext | None,
        session: Session | None,
    ) -> None:
        self.limits = limits
        self.headers = headers
        self.ssl = ssl
        self.session = session
        self.closed = False
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        self._past = PoolStats()  # of pools that are gone
        self._lock = threading.Lock()
        _managers.add(self)

    def check_open(self) -> None:
        """Raise `ConfigurationError` when the client was closed."""
        if self.closed:
            raise ConfigurationError("this client was closed; make a new one, or close it later")

    def pool(self) -> Pool:
        """Return the running loop's pool.

        Raises:
            ConfigurationError: the client was closed, or its session belongs to another loop.
        """
        self.check_open()
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        return pool if pool is not None and pool.is_open else self._open(loop)

    def _open(self, loop: asyncio.AbstractEventLoop) -> Pool:
        with self._lock:
            self.check_open()
            for other in [other for other in self._pools if other.is_closed() or other is loop]:
                past = self._pools.pop(other)
                self._remember(past)
                if other is not loop:
                    past.close_from_outside()
            pool = self._pools[loop] = Pool(loop, self.limits, self.headers, self.ssl, self.session)
        return pool

    def _remember(self, pool: Pool) -> None:
        past = pool.stats()
        self._past = PoolStats(created=self._past.created + past.created, reused=self._past.reused + past.reused)

    def stats(self) -> PoolStats:
        """The sum over all loops."""
        every = [self._past, *(pool.stats() for pool in list(self._pools.values()))]
        return PoolStats(**{name: sum(getattr(one, name) for one in every) for name in PoolStats.__struct_fields__})

    async def close(self) -> None:
        """Close every pool. Doing so twice is fine."""
        with self._lock:
            self.closed = True
            pools, self._pools = self._pools, {}
            for pool in pools.values():
                self._remember(pool)
        running = pools.pop(asyncio.get_running_loop(), None)
        for pool in pools.values():
            pool.close_from_outside()
        if running is not None:
            await running.close()

    def disown(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._lock = threading.Lock()  # it may have been held when the process forked
        for pool in self._pools.values():
            pool.disown()
            _inherited.append(pool)
        self._pools = {}


_managers: "weakref.WeakSet[SessionManager]" = weakref.WeakSet()
_inherited: list[Pool] = []  # the parent's pools, kept in a forked child so that nothing closes them


def _after_fork() -> None:
    for manager in list(_managers):
        manager.disown()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
