"""The plugin as a package, and its backend against a stub of `torch.sdaa` made from the vendor's documentation."""

from torchport.testing import BackendConformance, ModuleStubConformance, PackageConformance


class TestPackage(PackageConformance):
    plugin = "sdaa"
    heavy_modules = ("torch_sdaa",)


class TestBackend(BackendConformance):
    backend = "sdaa"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = ("torch_sdaa",)


class TestOnAStub(ModuleStubConformance):
    backend = "sdaa"
    documentation = ("https://github.com/deepspeedai/DeepSpeed/blob/master/accelerator/sdaa_accelerator.py",)
    tool = "teco-smi"
    process_group = "cpu:gloo,sdaa:tccl"
