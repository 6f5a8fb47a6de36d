"""The conformance kit: suites that a plugin's own tests inherit from.

```python
from torchport.testing import PackageConformance

class TestPackage(PackageConformance):
    plugin = "acme"  # the entry-point name
```
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("torchport.testing.package")

from torchport.testing.package import PackageConformance  # noqa: E402

__all__ = ["PackageConformance"]
