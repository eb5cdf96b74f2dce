"""Triton's real front end and launcher for an H100, on a stand-in for the CUDA driver.

`start()` makes this process one with a GPU, as far as `fastdml_kernels` can tell: tensors in
ordinary memory say that they are on `cuda:0`, and kernels are launched there, but a launch is only
written down. So results are memory that nobody has filled. What can be seen is what the host does:
which kernels are compiled, with which arguments and grids they are launched, and how much of the
host's time that takes.

It changes torch and Triton for the whole process: use a process of its own, without Triton's
interpreter (`tests/kernels/compiled.py`). It needs a C compiler, as does Triton's launcher.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
KEPT, FUNCTIONS, ARGUMENTS = 1024, 4096, 128  # as in SOURCE
BYTES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}  # by a type's bits


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    threads: int  # a program's
    stream: int
    # By the kernel's parameters: a pointer is its address, a tuple stays one, constants are what
    # the kernel was compiled with.
    arguments: dict[str, Any]
    function: int  # the driver's handle: another one for each kernel compiled


class _Kept(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("arguments", ctypes.c_uint64 * ARGUMENTS),
    )


class Device(str):
    """What tensors say their device is: to Python `cuda:0`, and to torch's functions that make
    tensors, which read it as a string, the CPU."""

    __slots__ = ()
    type, index = "cuda", 0

    def __new__(cls) -> Device:
        return super().__new__(cls, "cpu")

    def __str__(self) -> str:
        return "cuda:0"

    __repr__ = __str__


def c_compiler() -> str | None:
    """The C compiler that Triton takes, if there is one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _build(folder: str) -> ctypes.CDLL:
    import triton

    compiler = c_compiler()
    if compiler is None:
        raise FileNotFoundError("the stand-in for the CUDA driver needs a C compiler: gcc or clang")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    library = Path(folder, "libcuda.so.1")
    # The name by which Triton's launcher asks for the driver finds a library of this soname.
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o",
         library, SOURCE], check=True,
    )  # fmt: skip
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class StandIn:
    """The stand-in of this process: `start()` makes it."""

    def __init__(self) -> None:
        # The launchers that Triton builds are linked to a file of this folder.
        self._folder = tempfile.TemporaryDirectory(prefix="stand-in-")
        library = _build(self._folder.name)
        self._launches = ctypes.c_uint64.in_dll(library, "stand_in_launches")
        self._functions = ctypes.c_uint64.in_dll(library, "stand_in_functions")
        self._kept = (_Kept * KEPT).in_dll(library, "stand_in_kept")
        sizes = ctypes.c_uint8 * ARGUMENTS * (FUNCTIONS + 1)
        self._sizes = sizes.in_dll(library, "stand_in_sizes")
        self._sources: dict[int, Any] = {}  # of each function
        self._cleared = 0
        self.stream = 0  # the current one
        self._capturing = ctypes.c_uint64.in_dll(library, "stand_in_capturing")
        self._end_graph = library.stand_in_end_graph
        self._end_graph.argtypes, self._end_graph.restype = (ctypes.c_uint64,), None
        self._graphs = 0

    @property
    def kernels(self) -> list[str]:
        """The names of all kernels loaded, in order, one for each that Triton compiled or found in
        its cache on disk."""
        return [source.fn.__name__ for source in self._sources.values()]

    def clear(self) -> None:
        """Forgets the launches so far."""
        self._cleared = self._launches.value

    def launches(self) -> list[Launch]:
        """Every launch since `clear()`. Raises RuntimeError where they were too many to keep."""
        first, end = self._cleared, self._launches.value
        if end - first > KEPT:
            raise RuntimeError(
                f"{end - first} launches, and the last {KEPT} are kept: clear() more"
            )
        return [self._launch(self._kept[i % KEPT]) for i in range(first, end)]

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Makes another stream the current one."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @property
    def is_capturing(self) -> bool:
        return self._capturing.value != 0

    @contextmanager
    def capture(self) -> Iterator[int]:
        """The current stream is captured into a CUDA graph, as far as torch and the driver say.
        The graph's number is for `end_graph`."""
        self._graphs += 1
        self._capturing.value = self._graphs
        try:
            yield self._graphs
        finally:
            self._capturing.value = 0

    def end_graph(self, graph: int) -> None:
        """The graph is destroyed, and its launches have finished."""
        self._end_graph(graph)

    def _launch(self, kept: _Kept) -> Launch:
        source = self._sources[kept.function]
        values = iter(kept.arguments)
        arguments = {
            name: _value(type_, (i,), values, source.constants)
            for i, (name, type_) in enumerate(source.signature.items())
        }
        return Launch(
            source.fn.__name__,
            tuple(kept.grid),
            kept.threads,
            kept.stream,
            arguments,
            kept.function,
        )

    def _loaded(self, function: int, source: Any) -> None:
        self._sources[function] = source
        types = _flat(source.signature.values())
        if len(types) > ARGUMENTS:
            raise ValueError(f"{source.fn.__name__}: {len(types)} arguments of {ARGUMENTS} at most")
        for i, type_ in enumerate(types):
            self._sizes[function][i] = _bytes(type_)


def _flat(signature: Any) -> list[str]:
    """The types of the arguments that a kernel is launched with."""
    flat = []
    for type_ in signature:
        if isinstance(type_, tuple):
            flat += _flat(type_)
        elif type_ != "constexpr":
            flat.append(type_)
    return flat


def _bytes(type_: str) -> int:
    return 8 if type_.startswith("*") else BYTES[type_.lstrip("iufpb")]


def _value(type_: Any, at: tuple[int, ...], values: Iterator[int], constants: Any) -> Any:
    """The argument at a path in the kernel's parameters, from the 64-bit words of the launch."""
    if isinstance(type_, tuple):
        return tuple(_value(t, (*at, i), values, constants) for i, t in enumerate(type_))
    if type_ == "constexpr":
        return constants[at]
    word = next(values)
    raw = word.to_bytes(8, "little")[: _bytes(type_)]
    if type_ in ("fp32", "f32"):
        return struct.unpack("<f", raw)[0]
    return int.from_bytes(raw, "little", signed=type_.startswith("i"))


def _drive(stand_in: StandIn) -> None:
    """Makes Triton's CUDA driver on the stand-in the active one."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

    latest: list[Any] = []  # the source of the kernel being loaded: the launcher is made first

    class Launcher(CudaLauncher):
        def __init__(self, source: Any, *rest: Any) -> None:
            super().__init__(source, *rest)
            latest[:] = [source]

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: stand_in.stream
            self.get_device_capability = lambda device=0: (9, 0)
            load = self.utils.load_binary

            def load_binary(*arguments: Any) -> tuple[Any, ...]:
                module, function, *facts = load(*arguments)
                stand_in._loaded(function, latest[0])
                return module, function, *facts

            self.utils.load_binary = load_binary

    triton.runtime.driver.set_active(Driver())


class _Stream:
    """What torch says of the current stream: an event on it has always happened."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _pretend(stand_in: StandIn) -> None:
    """Tensors in ordinary memory are on `cuda:0`, an H100, to whoever asks from Python."""
    tensor, cuda = torch.Tensor, torch.cuda
    # Attributes of the class, and no properties: they cost the host no call.
    tensor.device, tensor.is_cuda, tensor.is_cpu = Device(), True, False
    tensor.get_device = lambda self: 0
    cuda.current_device = lambda: 0
    cuda._exchange_device = cuda._maybe_exchange_device = lambda index: 0
    cuda.is_current_stream_capturing = lambda: stand_in.is_capturing
    cuda.current_stream = lambda device=None: _Stream(stand_in.stream)
    torch._C._cuda_getCurrentRawStream = lambda index: stand_in.stream
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=233472, max_threads_per_multi_processor=2048,
    )  # fmt: skip


def _without_machine_code() -> None:
    """Stops compiling after the front end, which takes a tenth of the time."""
    from triton.backends.nvidia.compiler import CUDABackend

    facts = {
        "shared": 0, "tmem_size": None, "tensordesc_meta": [],
        "global_scratch_size": 0, "global_scratch_align": 1,
        "profile_scratch_size": 0, "profile_scratch_align": 1,
    }  # fmt: skip

    def no_code(self: Any, source: Any, metadata: dict[str, Any], *_: Any) -> bytes:
        metadata.update(facts, name="kernel")
        return b""

    CUDABackend.make_ttgir = staticmethod(lambda source, *_: source)
    CUDABackend.make_llir = CUDABackend.make_ptx = lambda self, source, *_: source
    CUDABackend.make_cubin = no_code
    # Part of the names in Triton's cache on disk, where the code of other processes is real.
    CUDABackend.hash = lambda self: f"front end alone, {facts}"


def start(*, machine_code: bool = False) -> StandIn:
    """Puts this process on the stand-in; machine_code: kernels are compiled to the end, though
    nothing reads the result. Raises FileNotFoundError where no C compiler is found, and
    RuntimeError under Triton's interpreter."""
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing is launched under Triton's interpreter: set TRITON_INTERPRET=0")
    if not machine_code:
        _without_machine_code()
    stand_in = StandIn()
    with warnings.catch_warnings():
        # torch asks once how many devices there are. Of the stand-in its CUDA runtime makes no
        # sense, and the answer is the right one: none.
        warnings.simplefilter("ignore")
        torch.cuda.is_available()
    _drive(stand_in)
    _pretend(stand_in)
    return stand_in
