"""What the tests of the core and of all plugins share: `tests/support`."""

pytest_plugins = ["preforking"]
