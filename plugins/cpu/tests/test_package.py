"""The cpu plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "cpu"
    heavy_modules = ("mpi4py", "psutil")
