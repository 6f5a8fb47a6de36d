"""What trackers share: plain numbers, flat names, images, tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchport.errors import ConfigurationError
from torchport.plugin import as_images, as_table, flatten, plain


def test_tensors_become_python_s_numbers_wherever_they_are():
    value = {"a": torch.tensor(1.5), "b": [np.float32(0.25), (torch.tensor([True]),)], 3: torch.arange(2)}
    assert plain(value) == {"a": 1.5, "b": [0.25, [True]], "3": [0, 1]}
    assert plain("text") == "text"


def test_nested_names_are_joined():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": {}, 5: 3}) == {"a/b": 1, "a/c/d": 2, "e": {}, "5": 3}
    assert flatten({"a": {"b": 1}}, ".") == {"a.b": 1}
    with pytest.raises(ConfigurationError, match="two values are named 'a/b'"):
        flatten({"a": {"b": 1}, "a/b": 2})


def shapes(value, *formats):
    return [image.shape for image in as_images(value, *formats)]


@pytest.mark.parametrize(
    ("value", "formats", "found"),
    [
        (np.zeros((2, 4, 5, 3), np.uint8), (), [(4, 5, 3)] * 2),
        (torch.zeros(2, 3, 4, 5), ("NCHW",), [(4, 5, 3)] * 2),
        (torch.zeros(3, 4, 5), ("NCHW",), [(4, 5, 3)]),
        (np.zeros((4, 5, 3)), (), [(4, 5, 3)]),
        (np.zeros((7, 4, 5)), ("NHW",), [(4, 5, 1)] * 7),
        (np.zeros((4, 5)), (), [(4, 5, 1)]),
        ([np.zeros((4, 5, 4)), np.zeros((2, 3))], (), [(4, 5, 4), (2, 3, 1)]),
        ([torch.zeros(1, 4, 5)], ("NCHW",), [(4, 5, 1)]),
        (np.zeros((0, 4, 5, 3)), (), []),
    ],
)
def test_images_of_any_layout_become_height_width_channels(value, formats, found):
    assert shapes(value, *formats) == found


def test_the_axes_are_not_mixed_up():
    value = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    images = as_images(value, "NCHW")
    assert all((images[n] == value[n].transpose(1, 2, 0)).all() for n in range(2))


def test_numbers_become_bytes():
    (image,) = as_images(torch.tensor([[-1.0, 0.0, 0.5, 1.0, 7.0, float("nan")]], dtype=torch.bfloat16))
    assert image[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
    assert as_images(np.array([[False, True]]))[0][0, :, 0].tolist() == [0, 255]
    assert as_images(np.array([[-3, 300]]))[0][0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("value", "formats", "message"),
    [
        (np.zeros(3), "NHWC", r"shape \(3,\) is no image of the format 'NHWC'"),
        (np.zeros((2, 3, 4, 5)), "NHWC", r"5 channels .* shape \(2, 3, 4, 5\)"),
        (np.zeros((2, 3, 4, 5)), "HW", "is no image of the format 'HW'"),
        (np.zeros((2, 3, 4, 5)), "NHWX", "is no image of the format 'NHWX'"),
    ],
)
def test_what_is_no_image_is_refused(value, formats, message):
    with pytest.raises(ConfigurationError, match=message):
        as_images(value, formats)


def test_tables_are_rows_or_a_data_frame():
    assert as_table(["a", "b"], [[torch.tensor(1), "x"]]) == (["a", "b"], [[1, "x"]])
    assert as_table(None, [[1, 2]]) == (["0", "1"], [[1, 2]])
    pandas = SimpleNamespace(columns=["a"], values=np.array([[1.5]]))
    polars = SimpleNamespace(columns=["a"], rows=lambda: [(1.5,)], values=None)
    assert as_table(dataframe=pandas) == as_table(dataframe=polars) == (["a"], [[1.5]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "found:  neither"),
        ({"data": [], "dataframe": object()}, "found:  both"),
        ({"columns": ["a"], "data": [[1], [1, 2]]}, "row 1 of the table has 2 values for 1 columns"),
    ],
)
def test_what_is_no_table_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        as_table(**arguments)
