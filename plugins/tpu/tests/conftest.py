"""Tests on the real runtimes run where these are installed: `make test-xla` makes environments that have them."""

import importlib.util

collect_ignore = [
    f"on_{runtime}" for runtime in ("torch_xla", "torch_tpu") if importlib.util.find_spec(runtime) is None
]
