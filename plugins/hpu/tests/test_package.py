"""The hpu plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "hpu"
    heavy_modules = ("habana_frameworks",)
