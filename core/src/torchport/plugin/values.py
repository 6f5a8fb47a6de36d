"""What trackers share: plain numbers out of tensors, flat names, images as bytes, tables as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchport.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np


def plain(value: Any) -> Any:
    """Return a tensor, an array or a scalar of any library as Python's own number, or (several elements) list.

    Mappings, lists and tuples are converted inside. Anything else is returned as it is.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    to_list = getattr(value, "tolist", None)  # tensors and arrays of any library
    if to_list is None:
        return value
    items = to_list()
    while isinstance(items, list) and len(items) == 1:
        items = items[0]
    return items


def flatten(values: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Return a nested mapping as one level: `{"a": {"b": 1}}` becomes `{"a/b": 1}`.

    Raises:
        ConfigurationError: if two entries come to have the same name.
    """
    flat: dict[str, Any] = {}
    for name, value in _walk(values, "", separator):
        if name in flat:
            raise ConfigurationError(
                f"two values are named {name!r} once nested ones are flattened",
                found=f"{flat[name]!r} and {value!r}",
                hint="rename one of them",
            )
        flat[name] = value
    return flat


def _walk(values: Mapping[str, Any], prefix: str, separator: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{name}{separator}", separator)
        else:
            yield name, value


def as_images(value: Any, dataformats: str = "NHWC") -> list[np.ndarray[Any, Any]]:
    """Return images as arrays of shape `(height, width, channels)` and dtype uint8, with 1, 3 or 4 channels.

    Args:
        value: A tensor or an array of several images or of one, a list of such, or of PIL images. Floating-point
            numbers are from 0 to 1, whole ones from 0 to 255.
        dataformats: What the dimensions of an array mean, out of N, H, W and C; of single images, without N. One of
            two dimensions is always `HW`.

    Raises:
        ConfigurationError: if a value has another number of dimensions, or of channels.
    """
    import numpy as np

    if isinstance(value, (list, tuple)):
        single = dataformats.replace("N", "")
        return [image for item in value for image in as_images(item, single)]
    order = dataformats.upper()
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.ndim == 2:
        order = "HW"
    elif array.ndim == 3 and "N" in order and "C" in order:
        order = order.replace("N", "")
    if sorted(order) not in (["H", "W"], ["C", "H", "W"], ["H", "N", "W"], ["C", "H", "N", "W"]) or (
        array.ndim != len(order)
    ):
        raise ConfigurationError(
            f"an array of shape {array.shape} is no image of the format {dataformats!r}",
            hint="arrays of shape (n, height, width, channels), or dataformats='NCHW'",
        )
    for missing, axis in (("N", 0), ("C", array.ndim)):
        if missing not in order:
            position = 0 if missing == "N" else len(order)
            array = np.expand_dims(array, 0 if axis == 0 else array.ndim)
            order = order[:position] + missing + order[position:]
    array = array.transpose([order.index(letter) for letter in "NHWC"])
    if array.shape[-1] not in (1, 3, 4):
        raise ConfigurationError(
            f"images with {array.shape[-1]} channels (found an array of shape {array.shape})",
            hint="1 channel (grey), 3 (red, green, blue) or 4 (and opacity); dataformats='NCHW' if they come first",
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        array = np.nan_to_num(array).clip(0.0, 1.0) * 255.0
        array = array.round()
    return list(np.ascontiguousarray(array.clip(0, 255).astype(np.uint8)))


def as_table(
    columns: Sequence[str] | None = None, data: Sequence[Sequence[Any]] | None = None, dataframe: Any = None
) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a table, with plain values.

    Args:
        columns: Names of the columns; `None` numbers them.
        data: The rows.
        dataframe: Instead of both: a data frame (anything with `columns` and `values` or `rows()`).

    Raises:
        ConfigurationError: if there is neither or both, or a row has another length.
    """
    if (dataframe is None) == (data is None):
        raise ConfigurationError(
            "a table has either rows (`data`) or a data frame (`dataframe`)",
            found="neither" if data is None else "both",
        )
    if dataframe is not None:
        columns = [str(name) for name in dataframe.columns]
        rows = dataframe.rows() if callable(getattr(dataframe, "rows", None)) else dataframe.values.tolist()
    else:
        rows = list(data or ())
        columns = [str(name) for name in (columns or range(len(rows[0]) if rows else 0))]
    wrong = next((index for index, row in enumerate(rows) if len(row) != len(columns)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"row {wrong} of the table has {len(rows[wrong])} values for {len(columns)} columns"
        )
    return columns, [[plain(value) for value in row] for row in rows]
