"""The fp8 plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "fp8"
    heavy_modules = ("torchao", "transformer_engine")
