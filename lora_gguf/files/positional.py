"""Reads and writes at a position of an open file: pread and pwrite, or where a system has neither (Windows) seeks under
a lock.

A call may move fewer bytes than asked for, and moves at most ``MOST``, more than which macOS refuses.
"""

from __future__ import annotations

import os
import threading

MOST = 1 << 30
_LOCK = threading.Lock()


def read_into(fd: int, buffer: memoryview, position: int) -> int:
    """Read into ``buffer`` (bytes, writable) from ``position`` on; how many bytes there were."""
    buffer = buffer[:MOST]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], position)
    if hasattr(os, "pread"):
        chunk = os.pread(fd, len(buffer), position)
    else:
        with _LOCK:
            os.lseek(fd, position, os.SEEK_SET)
            chunk = os.read(fd, len(buffer))
    buffer[: len(chunk)] = chunk
    return len(chunk)


def write(fd: int, buffer: memoryview, position: int) -> int:
    """Write ``buffer`` (bytes) at ``position``; how many bytes were written."""
    buffer = buffer[:MOST]
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, buffer, position)
    with _LOCK:
        os.lseek(fd, position, os.SEEK_SET)
        return os.write(fd, buffer)
