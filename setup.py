"""Two import names from one distribution: `fastdml` and, from kernels/, `fastdml_kernels`; and the
CPU's loss in native code, without which (no C compiler) everything works, slower."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

NATIVE = Path("kernels/fastdml_kernels")
CPU_ROWS = Extension(
    "fastdml_kernels._cpu_rows",
    sorted(map(str, NATIVE.glob("cpu_rows*.c"))),
    depends=sorted(map(str, NATIVE.glob("cpu_*.h"))),
    extra_compile_args=["-O3", "-g0", "-std=c11", "-ffp-contract=off", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread", "-lm"],
    py_limited_api=True,  # it has no Python in it: ctypes loads it
    optional=True,
)

setup(
    packages=[*find_packages(include=["fastdml", "fastdml.*"]), *find_packages("kernels")],
    package_dir={"fastdml_kernels": "kernels/fastdml_kernels"},
    package_data={
        "fastdml": ["py.typed"],
        "fastdml.report.html": ["templates/*"],
        "fastdml_kernels": ["py.typed", "tile_table.json"],
    },
    ext_modules=[CPU_ROWS],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every Python
)
