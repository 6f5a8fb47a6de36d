"""The plugin as a package, and its backend against a stub of `torch.mlu` made from the vendor's documentation."""

from torchport.testing import BackendConformance, ModuleStubConformance, PackageConformance


class TestPackage(PackageConformance):
    plugin = "mlu"
    heavy_modules = ("torch_mlu",)


class TestBackend(BackendConformance):
    backend = "mlu"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = ("torch_mlu",)


class TestOnAStub(ModuleStubConformance):
    backend = "mlu"
    documentation = ("https://github.com/Cambricon/torch_mlu",)
    tool = "cnmon"
    process_group = "cpu:gloo,mlu:cncl"
