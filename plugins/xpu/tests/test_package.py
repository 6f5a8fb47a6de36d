"""The xpu plugin as a package."""

from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "xpu"
    heavy_modules = ("intel_extension_for_pytorch",)
