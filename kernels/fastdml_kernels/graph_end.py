"""When a CUDA graph is over: it and all its executables destroyed, their launches finished.

No object of Python stands for that: a graph may be captured by anybody, cloned, and instantiated
several times. The driver knows. A capture hands its graph a "user object", a pointer and a function
that the driver calls with it in the end (CUDA programming guide, "CUDA user objects"; NCCL frees
its buffers that way). It calls from a thread of its own, which must not wait: for Python's lock,
say. So the function is the C library's `sem_post`, and the pointer a semaphore that Python polls.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

CAPTURE_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
MOVE = 1  # CU_GRAPH_USER_OBJECT_MOVE: the graph takes over the caller's reference
SEMAPHORE_BYTES = 128  # sizeof(sem_t) is 32 at most


class _Library(NamedTuple):
    """Functions of the C library and of the driver."""

    calloc: Any
    free: Any
    sem_init: Any
    sem_post: Any
    sem_trywait: Any
    stream_get_capture_info: Any
    user_object_create: Any
    user_object_release: Any
    graph_retain_user_object: Any


@cache
def _library() -> _Library | None:
    """None without an NVIDIA driver, or with one older than CUDA 11.3."""
    try:
        c, cuda = ctypes.CDLL(None), ctypes.CDLL("libcuda.so.1")
        found = _Library(
            c.calloc, c.free, c.sem_init, c.sem_post, c.sem_trywait,
            cuda.cuStreamGetCaptureInfo_v2, cuda.cuUserObjectCreate, cuda.cuUserObjectRelease,
            cuda.cuGraphRetainUserObject,
        )  # fmt: skip
    except (OSError, AttributeError, TypeError):
        return None
    found.calloc.argtypes, found.calloc.restype = (c_size_t, c_size_t), c_void_p
    found.free.argtypes = (c_void_p,)
    found.sem_init.argtypes = (c_void_p, c_int, c_uint)
    found.sem_trywait.argtypes = (c_void_p,)
    found.stream_get_capture_info.argtypes = (c_void_p,) * 6
    found.user_object_create.argtypes = (c_void_p, c_void_p, c_void_p, c_uint, c_uint)
    found.user_object_release.argtypes = (c_void_p, c_uint)
    found.graph_retain_user_object.argtypes = (c_void_p, c_void_p, c_uint, c_uint)
    return found


class GraphEnd:
    """The end of one graph."""

    def __init__(self, library: _Library) -> None:
        self.library = library
        # Not a buffer of Python's: the driver may call when nothing of Python is left.
        self.semaphore = library.calloc(1, SEMAPHORE_BYTES)
        library.sem_init(self.semaphore, 0, 0)

    @classmethod
    def of_capture(cls, stream: int) -> GraphEnd | None:
        """Of the graph that a stream, given by its handle, is being captured into; None where the
        driver does not tell (ROCm, CUDA before 11.3)."""
        library = _library()
        if library is None:
            return None
        status, graph, holder = c_int(0), c_void_p(), c_void_p()
        identity, dependencies, count = c_uint64(), c_void_p(), c_size_t()
        outputs = (status, identity, graph, dependencies, count)
        if library.stream_get_capture_info(stream, *map(ctypes.addressof, outputs)) != 0:
            return None
        if status.value != CAPTURE_ACTIVE:
            return None
        end = cls(library)
        notify = ctypes.cast(library.sem_post, c_void_p)
        create = library.user_object_create
        if create(ctypes.addressof(holder), end.semaphore, notify, 1, NO_DESTRUCTOR_SYNC) != 0:
            return None
        if library.graph_retain_user_object(graph, holder, 1, MOVE) != 0:
            library.user_object_release(holder, 1)
            return None
        return end

    def reached(self) -> bool:
        """Whether the graph is over; not to be asked again once it is."""
        over = self.library.sem_trywait(self.semaphore) == 0
        if over:
            self.library.free(self.semaphore)
        return over
