"""The compiled parts: the CPU digest, a look at many tensors' addresses, and many short reads of a file. They
need a C and C++17 compiler and no torch headers; where they can't be built, weightbus installs without them and
is slower."""

from setuptools import Extension, find_packages, setup

setup(
    packages=[*find_packages(include=["weightbus*"]), "weightbus.csrc"],
    ext_modules=[
        Extension(
            "weightbus.digest._grid61",
            ["csrc/grid61_cpu.cpp"],
            depends=["csrc/grid61.h", "csrc/sha256.h"],
            extra_compile_args=["-std=c++17", "-O3"],
            optional=True,
        ),
        Extension(
            "weightbus.tensors._addresses",
            ["csrc/addresses.cpp"],
            extra_compile_args=["-std=c++17", "-O3"],
            optional=True,
        ),
        Extension("weightbus.storage._pread", ["csrc/pread.c"], optional=True),
    ],
)
