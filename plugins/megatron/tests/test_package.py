"""The megatron plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "megatron"
    heavy_modules = ("megatron",)
