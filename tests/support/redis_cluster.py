"""A cluster of three masters and their replicas, and sentinels that watch a master."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import redis
from redis.crc import key_slot

from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

MASTERS = 3
SLOTS = 16384


class Cluster:
    """Six nodes: three masters, then the replica of each."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def master_of(self, key: bytes) -> RedisServer:
        """Return the node that has the slot of *key*, as a node that lives sees it."""
        slot = key_slot(key)
        for first, last, primary, *_ in self._alive().do("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"nobody has slot {slot}")

    def id_of(self, node: RedisServer) -> str:
        found = node.do("CLUSTER", "MYID")
        assert isinstance(found, bytes)
        return found.decode()

    def begin_migration(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        target.do("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))

    def migrate(self, key: bytes, source: RedisServer, target: RedisServer) -> None:
        source.do("MIGRATE", "127.0.0.1", target.port, key, 0, 10_000)

    def end_migration(self, slot: int, target: RedisServer) -> None:
        """Give the slot to *target*, and let all nodes that live know."""
        owner = self.id_of(target)
        for node in [target, *(node for node in self.nodes[:MASTERS] if node is not target)]:
            node.do("CLUSTER", "SETSLOT", slot, "NODE", owner)

    def flush(self) -> None:
        for node in self.nodes[:MASTERS]:
            node.do("FLUSHALL")

    def _alive(self) -> RedisServer:
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError):
                node.do("PING")
                return node
        raise AssertionError("no node lives")


@contextlib.contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """Start a cluster below *directory* whose nodes notice within a second that one is gone."""
    options = (
        *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
        *("--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0"),
        *("--cluster-require-full-coverage", "no"),
    )
    with contextlib.ExitStack() as running:
        nodes = [
            running.enter_context(RedisServer(directory / str(number), *options))
            for number in range(2 * MASTERS)
        ]
        _join(nodes)
        yield Cluster(nodes)


def _join(nodes: list[RedisServer]) -> None:
    for number, node in enumerate(nodes):
        node.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number < MASTERS:
            first, last = number * SLOTS // MASTERS, (number + 1) * SLOTS // MASTERS - 1
            node.do("CLUSTER", "ADDSLOTSRANGE", first, last)
        nodes[0].do("CLUSTER", "MEET", "127.0.0.1", node.port)
    wait_until(lambda: all(_known(node) == len(nodes) for node in nodes), what="all nodes meet")
    for master, replica in zip(nodes[:MASTERS], nodes[MASTERS:], strict=True):
        owner = master.do("CLUSTER", "MYID")
        wait_until(lambda: _replicates(replica, owner), what="a replica knows its master")  # noqa: B023
    wait_until(lambda: all(_is_ready(node) for node in nodes), what="the cluster is ready")


def _known(node: RedisServer) -> int:
    lines = node.do("CLUSTER", "NODES").splitlines()
    return sum(1 for line in lines if b"handshake" not in line)


def _replicates(replica: RedisServer, owner: object) -> bool:
    try:
        replica.do("CLUSTER", "REPLICATE", owner)
    except redis.ResponseError:
        return False
    return True


def _is_ready(node: RedisServer) -> bool:
    lines = node.do("CLUSTER", "INFO").splitlines()
    link = node.do("INFO", "replication")
    is_synced = link["role"] == "master" or link["master_link_status"] == "up"
    return {b"cluster_state:ok", b"cluster_slots_ok:%d" % SLOTS} <= set(lines) and is_synced


@contextlib.contextmanager
def running_sentinels(directory: Path, master: RedisServer, count: int) -> Iterator[list[int]]:
    """Start *count* sentinels that watch *master* as `cache`; return their ports.

    They ask for the master's password, too, when it has one.
    """
    secret = master.password
    secrets = (
        f"requirepass {secret}\n"
        f"sentinel sentinel-pass {secret}\n"
        f"sentinel auth-pass cache {secret}\n"
    )
    with contextlib.ExitStack() as running:
        sentinels = []
        for number in range(count):
            place = directory / f"sentinel{number}"
            place.mkdir(parents=True)
            config = place / "sentinel.conf"
            config.write_text(
                f"sentinel monitor cache 127.0.0.1 {master.port} {count // 2 + 1}\n"
                "sentinel down-after-milliseconds cache 500\n"
                "sentinel failover-timeout cache 3000\n" + (secrets if secret else "")
            )
            sentinel = RedisServer(place, config=config, password=secret)
            sentinels.append(running.enter_context(sentinel))
        wait_until(
            lambda: all(_sees(sentinel, count - 1) for sentinel in sentinels),
            what="sentinels know each other and the replica",
        )
        yield [sentinel.port for sentinel in sentinels]


def _sees(sentinel: RedisServer, others: int) -> bool:
    with sentinel.client() as client:
        state = client.sentinel_master("cache")
    return state["num-other-sentinels"] == others and state["num-slaves"] > 0
