"""The sub-commands `torchport merge-weights` and `torchport to-fsdp2`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torchport.errors import ConfigurationError

_NAMES = {"token_normalize_func": lambda token: token.replace("_", "-")}


@click.command("merge-weights", context_settings=_NAMES)
@click.argument("checkpoint_directory")
@click.argument("output_path")
@click.option(
    "--unsafe-serialization", is_flag=True, help="Write pytorch_model.bin instead of model.safetensors."
)
@click.option("--remove-checkpoint-dir", is_flag=True, help="Delete the sharded checkpoint afterwards.")
def merge_weights(
    checkpoint_directory: str, output_path: str, unsafe_serialization: bool, remove_checkpoint_dir: bool
) -> None:
    """Merge the weights of a sharded checkpoint into whole files.

    CHECKPOINT_DIRECTORY is what save_state wrote, or the folder of one model in it; OUTPUT_PATH is a folder.
    """
    from torchport_fsdp.merge import merge_fsdp_weights

    files = merge_fsdp_weights(
        checkpoint_directory, output_path, not unsafe_serialization, remove_checkpoint_dir
    )
    for file in files:
        click.echo(f"wrote {file} ({file.stat().st_size:,} bytes)")


@click.command("to-fsdp2", context_settings=_NAMES)
@click.option("--config-file", required=True, help="The file to read.")
@click.option("--output-file", default=None, help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Write to the file that was read.")
def to_fsdp2(config_file: str, output_file: str | None, overwrite: bool) -> None:
    """Rewrite a configuration file for FSDP1 as one for FSDP2."""
    if overwrite == (output_file is not None):
        raise ConfigurationError(
            "to-fsdp2 needs to know where to write", hint="either --output-file FILE or --overwrite"
        )
    import yaml
    from torchport.config.file import read_yaml

    content = read_yaml(config_file)
    section = content.get("fsdp_config")
    if not isinstance(section, dict):
        raise ConfigurationError(
            f"{config_file} does not configure FSDP",
            found="no section fsdp_config",
            hint="distributed_type: FSDP",
        )
    converted, notes = convert(section)
    target = Path(config_file if output_file is None else output_file)
    target.write_text(yaml.safe_dump({**content, "fsdp_config": converted}, sort_keys=True), encoding="utf-8")
    for note in notes:
        click.echo(note)
    click.echo(f"wrote {target}")


_GONE = {
    "fsdp_backward_prefetch": "FSDP2 prefetches as BACKWARD_PRE does",
    "fsdp_backward_prefetch_policy": "FSDP2 prefetches as BACKWARD_PRE does",
    "fsdp_sync_module_states": "all processes start from rank 0's states",
    "fsdp_use_orig_params": "parameters always keep their identity",
    "fsdp_limit_all_gathers": "FSDP2 always limits them",
}
_KEPT_STRATEGIES = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "NO_SHARD")


def convert(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the section `fsdp_config` for FSDP2, and a line about each key that is not simply kept.

    Raises:
        ConfigurationError: if the section is for FSDP2 already, or a value has no counterpart.
    """
    from torchport_fsdp.config import ShardingStrategy

    if str(section.get("fsdp_version", "1")) == "2":
        raise ConfigurationError("the file is for FSDP2 already", found="fsdp_version: 2")
    converted: dict[str, Any] = {"fsdp_version": 2}
    notes = []
    for key, value in section.items():
        if key == "fsdp_version":
            continue
        if key in _GONE:
            notes.append(f"left out {key}: {_GONE[key]}")
        elif key == "fsdp_sharding_strategy":
            try:
                strategy = ShardingStrategy(value)
            except ValueError as error:
                raise ConfigurationError(f"{key}: {value!r} is not known", reason=str(error)) from error
            if strategy.value in _KEPT_STRATEGIES:
                converted[key] = strategy.value
                continue
            converted["fsdp_reshard_after_forward"] = strategy.reshards
            notes.append(
                f"{key}: {strategy.value} is fsdp_reshard_after_forward: {str(strategy.reshards).lower()}"
            )
        elif key == "fsdp_state_dict_type" and value == "LOCAL_STATE_DICT":
            converted[key] = "SHARDED_STATE_DICT"
            notes.append(f"{key}: LOCAL_STATE_DICT is SHARDED_STATE_DICT")
        else:
            converted[key] = value
    return converted, notes
