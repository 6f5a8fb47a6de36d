"""The plugin as a package, and its backend against a stub of `torch.musa` made from the vendor's documentation."""

from torchport.testing import BackendConformance, ModuleStubConformance, PackageConformance


class TestPackage(PackageConformance):
    plugin = "musa"
    heavy_modules = ("torch_musa",)


class TestBackend(BackendConformance):
    backend = "musa"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = ("torch_musa",)


class TestOnAStub(ModuleStubConformance):
    backend = "musa"
    documentation = ("https://github.com/MooreThreads/torch_musa",)
    tool = "mthreads-gmi"
    process_group = "cpu:gloo,musa:mccl"
