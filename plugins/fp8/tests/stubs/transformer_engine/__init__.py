"""A stub of TransformerEngine 2, made from its public documentation, for machines without its devices.

https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/common.html and .../api/pytorch.html
It has the documented names and arguments, computes in the dtype of its inputs, and notes what it was told.
"""
