"""The documented helper that installs torch_xla beside the installed PyTorch."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from torchport.errors import ConfigurationError

LAST = (2, 9)
"""The last minor release of torch_xla; newer ones of PyTorch have torch_tpu."""


def install_xla(upgrade: bool = False) -> None:
    """Install the release of `torch_xla` that goes with the installed PyTorch, by pip.

    Args:
        upgrade: Whether PyTorch is replaced by the last release for which there is one.

    Raises:
        ConfigurationError: if there is none for this PyTorch, or pip fails.
    """
    command = [sys.executable, "-m", "pip", "install", *requirements(upgrade)]
    if subprocess.run(command, check=False).returncode:
        raise ConfigurationError("torch_xla could not be installed", found=" ".join(command))


def requirements(upgrade: bool, torch: str | None = None) -> tuple[str, ...]:
    """Return what pip has to install.

    Args:
        upgrade: Whether PyTorch may be replaced.
        torch: The installed version of PyTorch; by default from its metadata.

    Raises:
        ConfigurationError: if there is no torch_xla for this PyTorch.
    """
    release = f"{LAST[0]}.{LAST[1]}"
    if upgrade:
        return f"torch=={release}.*", f"torch_xla=={release}.*"
    found = torch or importlib.metadata.version("torch")
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) > LAST:
        raise ConfigurationError(
            f"torch_xla has no release for PyTorch {found}",
            reason=f"its last one is {release}; torch_tpu is its successor",
            hint="pip install 'torchport-tpu[torch-tpu]', or install_xla(upgrade=True) for an older PyTorch",
        )
    return (f"torch_xla=={major}.{minor}.*",)
