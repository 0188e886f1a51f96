"""An engine process that stores, loads and reserves, and then holds on to all of it.

`python -m tests.support.holder SOCKET [close]`: says "holding" once it does, and waits for its
end. With "close" it ends its session first, but keeps the arena mapped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvstore.client.sync import Client
from tests.support.making import make_digests, make_manifest, make_payload, sources_of

MANIFEST = make_manifest(model="holder")
STORED = make_digests(3)
RESERVED = make_digests(6, prompt=1)


def main(path: str, *rest: str) -> None:
    client = Client.connect(Path(path), name="holder")
    space = client.attach(MANIFEST)
    space.store(STORED, sources_of(MANIFEST, STORED))
    with space.load(STORED), space.reserve(RESERVED) as vacancies:
        for vacancy in vacancies[:3]:
            vacancy.view[:] = make_payload(vacancy.digest, MANIFEST.chunk_bytes)
            vacancy.seal()
        vacancies[3].view[:100] = bytes(100)
        if rest:
            client.close()
        sys.stdout.write("holding\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
