"""The plugin as a package, and its backend against a stub of `torch.npu` made from the vendor's documentation."""

from torchport.testing import BackendConformance, ModuleStubConformance, PackageConformance


class TestPackage(PackageConformance):
    plugin = "npu"
    heavy_modules = ("torch_npu",)


class TestBackend(BackendConformance):
    backend = "npu"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = ("torch_npu",)


class TestOnAStub(ModuleStubConformance):
    backend = "npu"
    documentation = ("https://github.com/Ascend/pytorch", "https://pypi.org/project/torch-npu/")
    tool = "npu-smi info"
    process_group = "cpu:gloo,npu:hccl"
