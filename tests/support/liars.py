"""A peer that knows the token and lies: what it offers and what it sends are the test's to say."""

from __future__ import annotations

import socket
import struct
import threading

from kvstore.hashing import block_digests, root_of
from kvstore.protocol import peering as p
from kvstore.types import HandoffState
from tests.support.hosts import TOKEN
from tests.support.making import make_manifest, make_payload

MANIFEST = make_manifest(model="hostile")
SIZE = MANIFEST.chunk_bytes


def frame(message: p.PeerMessage) -> bytes:
    body = p.encode(message)
    return struct.pack("<I", len(body)) + body


def read(connection: socket.socket) -> p.AnyPeerMessage:
    head = connection.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        raise ConnectionResetError("closed")
    return p.decode(connection.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL))


def offer(digest, payload=None, size=SIZE, heads=(0, 4)) -> p.Offer:
    root = root_of(block_digests(payload or make_payload(digest, SIZE)))
    return p.Offer(digest, [p.OfferedShard(*heads, size, root)])


class Liar:
    """A peer that knows the token: it offers *offers*, and *answer* is what it sends for them."""

    def __init__(self, offers, answer, *, version: int = p.PEER_VERSION, token: str = TOKEN):
        self.offers, self.answer, self.version = offers, answer, version
        self.asked: list[type[p.PeerMessage]] = []
        self.returned: list[bool] = []
        self.token = token.strip().encode()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                nonce = bytes(32)
                connection.sendall(frame(p.PeerNonce(self.version, nonce)))
                hello = read(connection)
                proof = p.called_proof(self.token, nonce, hello.nonce, "prefill")
                connection.sendall(frame(p.PeerWelcome("prefill", proof)))
                while True:
                    self._reply(connection, read(connection))
            except OSError:
                return

    def _reply(self, connection: socket.socket, request: p.AnyPeerMessage) -> None:
        self.asked.append(type(request))
        if isinstance(request, p.Follow):
            offers = self.offers[request.first :]
            connection.sendall(frame(p.Following(HandoffState.CLOSED, offers, True)))
        elif isinstance(request, p.Want | p.Grant):
            connection.sendall(self.answer(request))
        elif isinstance(request, p.Have):
            shards = {one.digest: one.shards for one in self.offers}
            held = [p.HeldChunk(b"", shards.get(digest, [])) for digest in request.digests]
            connection.sendall(frame(p.Holding(held)))
        elif isinstance(request, p.Returned):
            self.returned.append(request.is_read)
        else:
            connection.sendall(frame(p.Left()))


def right(want: p.Want) -> bytes:
    payload = make_payload(want.digest, want.shard.size_bytes)
    return frame(p.Sending(len(payload))) + payload
