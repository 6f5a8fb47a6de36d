"""Every flag that Accelerate documents for sharding and precision comes from the schema of a plugin of ours."""

from pathlib import Path

import click
import pytest
import yaml
from torchport.aliases import PLUGIN_PREFIXES
from torchport.cli import cli
from torchport.config import schema
from torchport.plan.registry import load_reference

pytestmark = pytest.mark.plugins
FILE = Path(__file__).parents[1] / "fixtures" / "accelerate" / "documented_flags.yaml"
HEADINGS = yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def flags():
    """Every spelling of every flag of `torchport launch`."""
    launch = cli.get_command(click.Context(cli), "launch")
    context = click.Context(launch)
    launch.get_help(context)  # which looks at plugins
    return {spelling for parameter in launch.get_params(context) for spelling in parameter.opts}


@pytest.mark.parametrize("page", HEADINGS, ids=lambda page: page["heading"])
def test_every_documented_flag_key_and_variable_is_derived_from_the_settings_of_a_plugin(page, flags):
    settings = schema.settings_of(load_reference(page["settings"]))
    for name in page["flags"]:
        spelling = name.replace("_", "-")
        (item,) = [item for item in settings if spelling in item.flags]
        assert item.env, name
        assert item.yaml, name
        assert item.help.endswith((".", "]")), name
        assert f"--{spelling}" in flags
    keys = {key for item in settings for key in item.keys}
    assert set(page["keys"]) <= keys
    if page["section"] != "fp8_config":  # whose keys leave out `fp8_`
        assert set(page["flags"]) <= keys


@pytest.mark.parametrize("page", HEADINGS, ids=lambda page: page["heading"])
def test_without_the_plugin_the_core_knows_which_to_install(page):
    plugin = page["settings"].split(".")[0].removeprefix("torchport_")
    shared = {"gradient_accumulation_steps"}  # the launch has it too
    for name in set(page["flags"]) - shared:
        assert any(name.startswith(prefix) for prefix, owner in PLUGIN_PREFIXES.items() if owner == plugin), (
            name
        )
