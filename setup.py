"""The compiled part: the CPU digest. It needs a C++17 compiler and no torch headers; where it can't
be built, weightbus installs without it and digests with torch operations, slower."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "weightbus.digest._grid61",
            ["csrc/grid61_cpu.cpp"],
            depends=["csrc/grid61.h", "csrc/sha256.h"],
            extra_compile_args=["-std=c++17", "-O3"],
            optional=True,
        )
    ]
)
