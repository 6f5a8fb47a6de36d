"""The deepspeed plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "deepspeed"
    heavy_modules = ("deepspeed", "torch")
