"""The fsdp plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "fsdp"
    heavy_modules = ("torch",)
