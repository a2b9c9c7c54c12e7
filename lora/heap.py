"""What glibc's heap comes to for a sequence of tensors, where the process keeps what it frees.

Between the tensors that a forward keeps lie holes, which later ones fit into or not, and what the
system counts of a process is its heap to the highest place, holes and all. How large they are is
glibc's affair: so it is asked. The blocks are taken and freed in a process that does nothing else,
in the order that the training would, and never written to, so that they cost no memory.

Run as a program it is that process: it needs nothing but Python, and answers in 50 ms.
"""

from __future__ import annotations

import array
import ctypes
import itertools
import subprocess
import sys
from collections.abc import Sequence

ALIGNED = 64  # torch takes the memory of a tensor so
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

Event = tuple[int, int]  # a block's number, and its bytes where it is taken; -1 where it is freed


def heap(events: Sequence[Event]) -> int:
    """Bytes of the heap after these blocks; where no glibc is, the most that lived at once."""
    flat = array.array("q", itertools.chain.from_iterable(events))
    command = [sys.executable, "-I", "-S", __file__]
    found = subprocess.run(command, input=flat.tobytes(), capture_output=True, check=True)
    return int(found.stdout)


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def alive(events: Sequence[Event]) -> int:
    """The most bytes that lived at once."""
    sizes: dict[int, int] = {}
    now = most = 0
    for number, size in events:
        if size >= 0:
            sizes[number] = size
        now += size if size >= 0 else -sizes.pop(number)
        most = max(most, now)
    return most


def _taken(events: Sequence[Event]) -> int:
    """What the heap of this very process grows by."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return alive(events)
    libc.mallinfo2.restype = _Info
    libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # as scratch.keep_freed_memory does
    libc.mallopt(M_MMAP_MAX, 0)
    place, places = ctypes.c_void_p(), dict[int, int | None]()
    before: int = libc.mallinfo2().arena
    for number, size in events:
        if size < 0:
            libc.free(places.pop(number))
        elif libc.posix_memalign(ctypes.byref(place), ALIGNED, size) == 0:
            places[number] = place.value
        else:  # there is no room for it, not even unwritten
            return alive(events)
    after: int = libc.mallinfo2().arena
    return after - before


if __name__ == "__main__":
    flat = array.array("q", sys.stdin.buffer.read())
    print(_taken(list(zip(flat[::2], flat[1::2], strict=True))))
