"""Compile the simulated accelerator for the PyTorch that is installed."""

from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "torchport-sim is compiled for the PyTorch that is installed, and there is none here:"
        " pip install torch first, then pip install --no-build-isolation torchport-sim"
    ) from error

SOURCES = sorted(str(path) for path in Path("csrc").iterdir())

setup(
    ext_modules=[
        CppExtension(
            "sim_runtime._C",
            ["csrc/sim.cpp"],  # which includes the others
            depends=SOURCES,
            extra_compile_args=["-std=c++20", "-O1", "-g0", "-Wall"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
