"""Ray Serve's choice of a replica, by the affinity of requests. Ray imports it by its name, nothing else does."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose


class AffinityRouter(RequestRouter):
    """Sends a request where the others with its key go, unless that replica has more than its share."""

    def initialize_state(self, bound: float = DEFAULT_BOUND) -> None:
        """Take `request_router_kwargs`. bound: see `choose`."""
        self._bound = bound

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """The replicas in the order in which to try them; a full one refuses, and the next is asked."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        key = pending_request.args[0] if pending_request is not None and pending_request.args else None
        order = []
        while loads:
            name = choose(key if isinstance(key, str) else None, loads, self._bound)
            order.append([by_name[name]])
            del loads[name]
        return order
