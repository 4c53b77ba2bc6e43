"""Build script: the C++ extension and the package list (metadata is in pyproject.toml)."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").glob("*.h"))

ParallelCompile("BUILD_JOBS").install()  # one compiler per core, or as many as BUILD_JOBS says

setup(
    # No -march: one binary for every x86-64, with the faster variants chosen when it is loaded.
    # -ffp-contract=off: no hidden FMA, so that all variants give the same bits.
    ext_modules=[
        Pybind11Extension(
            "engine._C",
            sources,
            depends=headers,
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    # engine/kernels is a link to kernels/, so that the device code installs inside the engine.
    packages=["engine", "engine.train", "engine.kernels", "selfreward", "selfreward.tiny"],
)
