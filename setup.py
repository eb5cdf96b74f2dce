"""Two import names from one distribution: `fastdml` and, from kernels/, `fastdml_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdml", "fastdml.*"]), *find_packages("kernels")],
    package_dir={"fastdml_kernels": "kernels/fastdml_kernels"},
)
