"""The tpu plugin as a package."""

from torchport.testing import BackendConformance, PackageConformance


class TestPackage(PackageConformance):
    plugin = "tpu"
    heavy_modules = ("torch_xla", "torch_tpu", "libtpu")


class TestTpu(BackendConformance):
    backend = "tpu"
    levels = ("L0",)
    verified_on = "stub"


class TestXla(BackendConformance):
    backend = "xla"
    levels = ("L0",)
