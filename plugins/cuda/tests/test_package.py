"""The cuda plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "cuda"
    heavy_modules = ("pynvml",)
