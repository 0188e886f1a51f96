"""On a GPU: a broken context, a fork, the end of a process: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstore.gpu.cupy_device import open_device
from tests.support.daemon import REPOSITORY

pytestmark = pytest.mark.gpu

BEGIN = """
import os, sys, threading
import numpy as np
from kvstore.gpu.batches import BATCH
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.device import Copy, DeviceError, DeviceLostError, Urgency, wait_for
device = open_device()
stream = device.stream(Urgency.LOW)
memory, pinned = device.allocate(4096), device.pin(4096)
"""

# A kernel that reads where nothing is: an error that never goes away.
BROKEN = """
wild = np.zeros(1, BATCH)
for name in ("sections", "pages", "containers"):
    wild[name] = 1 << 20
for name in ("chunk_count", "section_count", "heads", "tokens", "width"):
    wild[name] = 1
wild["page_tokens"] = wild["page_count"] = 1
stream.launch("raw_gather", wild)
event = None
try:
    event = stream.record()
    wait_for(event)
    sys.exit("the kernel has ended well")
except DeviceLostError:
    pass
calls = (
    stream.record,
    lambda: device.allocate(4096),
    lambda: device.stream(Urgency.HIGH),
    lambda: stream.copy([Copy(memory.address, pinned.address, 64)]),
    lambda: stream.launch("raw_gather", wild),
)
for number, call in enumerate(calls):
    try:
        call()
    except DeviceLostError:
        continue
    sys.exit(f"call {number} went well")
memory.free()
pinned.free()
"""

# A child has no context of its own, and cannot have its parent's.
FORKED = """
wait_for(stream.record())
child = os.fork()
if child == 0:
    try:
        found = open_device()
        if found is not None:
            found.allocate(4096)
    except DeviceError:
        found = None
    os._exit(0 if found is None else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, "a child has used its parent's device"
wait_for(stream.record())
"""

# Nothing is given back before the process ends, and a thread has made calls and is gone.
LEFT = """
nothing = np.zeros(1, BATCH)
for name in ("heads", "tokens", "width", "page_tokens"):
    nothing[name] = 1
def work():
    stream.copy([Copy(memory.address, pinned.address, 4096)])
    stream.launch("whole_gather", nothing)
    wait_for(stream.record())
thread = threading.Thread(target=work)
thread.start()
thread.join()
wait_for(stream.record())
"""


@pytest.mark.parametrize("scene", [BROKEN, FORKED, LEFT], ids=["broken", "forked", "left"])
def test_a_process_ends_as_it_should(scene: str) -> None:
    if open_device() is None:
        pytest.skip("no GPU, no CuPy, or no kernels")
    # Python warns of forks beside threads, and CUDA has some.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + scene]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    if scene is not BROKEN:  # CuPy may say what it could not give back
        assert ended.stderr == ""
