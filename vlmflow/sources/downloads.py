"""Downloads over connections that stay open from one batch of images to the next.

They belong to an event loop, which goes on in a thread of its own. Ray unpickles a reader for every batch, and a worker
reads many: only the process can keep them.
"""

from __future__ import annotations

import asyncio
import os
import threading

from vlmflow.config import HttpConfig, read_secret
from vlmflow.sources.connections import KEPT_S, open_pool
from vlmflow.sources.http import Download, HttpFetcher

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: of a fork, the thread has stayed behind
_kept: dict[tuple[int, HttpConfig, str | None], Downloads] = {}


class Downloads:
    """The connections of this process for one configuration; of any thread and any event loop.

    Raises:
        ConfigError: as :func:`vlmflow.sources.connections.open_pool`.
    """

    def __init__(self, config: HttpConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._config, self._loop = config, loop
        self._pool = open_pool(config)
        self._num_under_way = 0
        self._closing: asyncio.TimerHandle | None = None
        self._closed: asyncio.Task[None] | None = None  # a loop holds its tasks only weakly

    async def fetch(self, url: str, validator: str | None, max_bytes: int) -> Download | None:
        """As :meth:`vlmflow.sources.http.HttpFetcher.fetch`."""
        coroutine = self._fetch(url, validator, max_bytes)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    async def _fetch(self, url: str, validator: str | None, max_bytes: int) -> Download | None:
        self._num_under_way += 1
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        try:
            return await HttpFetcher(self._config, max_bytes, self._pool).fetch(url, validator)
        finally:
            self._num_under_way -= 1
            if not self._num_under_way:
                self._closing = self._loop.call_later(KEPT_S, self._close)

    def _close(self) -> None:
        # The pool itself looks at its idle connections only when it is asked for one, and may not be asked again.
        self._closed = self._loop.create_task(self._pool.aclose())


def downloads_of(config: HttpConfig) -> Downloads:
    """Those of this process, made where there are none yet.

    Raises:
        ConfigError: as :func:`vlmflow.sources.connections.open_pool`.
    """
    process = os.getpid()
    proxy = None if config.proxy_env is None else read_secret(config.proxy_env, "source.http.proxy_env")
    with _lock:
        if process not in _loops:
            _loops[process] = asyncio.new_event_loop()
            threading.Thread(target=_loops[process].run_forever, daemon=True).start()
        if (process, config, proxy) not in _kept:
            _kept[process, config, proxy] = Downloads(config, _loops[process])
        return _kept[process, config, proxy]
