"""Ends a run whose models nobody gets loaded.

Ray restarts an actor without end, also one that is killed each time it loads its models, and Ray Data waits for it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from vlmflow.errors import ModelsKilledError

MAX_KILLED = 3
MAX_STARTS = 4 * MAX_KILLED  # of one actor while it waits for others, which may be gone for good


@dataclass(frozen=True)
class Starts:
    """How often the actors of a pool were killed while they loaded; kept by the cluster, which survives them.

    A few bytes for each actor stay with it for as long as it lives.

    Attributes:
        pool: its name, as a user is told it.
        key: of this pool in this pipeline.
    """

    pool: str
    key: str = field(default_factory=lambda: f"vlmflow-starts-{uuid.uuid4().hex}")

    def begin(self) -> None:
        """Counts a start of the actor that this process is.

        Where another actor of the pool has its models, the run goes on with that one, and this may try for ever; where
        another may still get them, it may try for long: nobody says of an actor that it never starts again, as that of
        a node that was lost.

        Raises:
            ModelsKilledError: this actor was killed again and again, and so was every other of the pool, or this one
                very often; none has ever loaded. Raised in a constructor, where Ray restarts nothing, it ends the
                pipeline.
        """
        num_killed = int(_internal_kv_get(self._mine) or 0)
        _internal_kv_put(self._mine, str(num_killed + 1))
        is_hopeless = num_killed >= MAX_STARTS or self._all_were_killed()
        if is_hopeless and not _internal_kv_exists(self._loaded):
            raise ModelsKilledError(
                f"pool {self.pool}: the process that loads its models was killed {num_killed} times before it had them"
            )

    def succeed(self) -> None:
        """Notes that this actor has its models."""
        _internal_kv_put(self._loaded, "")
        _internal_kv_del(self._mine)

    def _all_were_killed(self) -> bool:
        counts = [_internal_kv_get(key) for key in _internal_kv_list(f"{self.key}-")]
        # The last start of each may be under way. No count: it has loaded since.
        return all(int(count) > MAX_KILLED for count in counts if count)

    @property
    def _mine(self) -> str:
        return f"{self.key}-{ray.get_runtime_context().get_actor_id()}"

    @property
    def _loaded(self) -> str:
        return f"{self.key}-loaded"
