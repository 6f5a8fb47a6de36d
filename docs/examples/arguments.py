"""What the examples' command lines have in common."""

import argparse


def at_least_one(text: str) -> int:
    """Read a number of epochs, steps or samples: with none there is nothing to measure."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)
