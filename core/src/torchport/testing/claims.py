"""What a plugin does not claim, as far as its descriptors and capabilities tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchport.plugin.specs import BackendSpec, Capabilities
from torchport.testing.checks import Subject, everything


def backend_spec(subject: Subject) -> BackendSpec:
    """Return the descriptor of the backend that a subject is tested on.

    Raises:
        SelectionError: if it is not installed.
    """
    spec = everything().find("backend", subject.backend, "the conformance kit").spec
    assert isinstance(spec, BackendSpec)
    return spec


def capabilities(subject: Subject) -> Capabilities:
    """Return what the backend declares that a subject is tested on."""
    return everything().capabilities(backend_spec(subject))


def one_process_only(subject: Subject) -> str:
    """Say why several processes cannot train together on the subject's devices; empty if they can."""
    spec = backend_spec(subject)
    if spec.single_process:
        return spec.single_process
    if not capabilities(subject).distributed:
        return f"the backend {spec.name!r} does not declare distributed"
    if not (subject.collectives or spec.collectives):
        return f"the backend {spec.name!r} names no collectives"
    return ""


def needs_more(subject: Subject, strategy: str, precision: str, processes: int) -> str:
    """Say what the backend lacks for training with a strategy in a precision; empty if nothing."""
    declared, installed = capabilities(subject), everything()
    for kind, name in (("strategy", strategy), ("precision", precision)):
        spec: Any = installed.find(kind, name, "the conformance kit").spec
        missing = spec.needs.missing(declared)
        if missing:
            lacking = " and no ".join(missing)
            return f"the backend {subject.backend!r} declares no {lacking}, which {kind} {name!r} needs"
    return one_process_only(subject) if processes > 1 else ""


def training_unclaimed(strategy: str, precision: str, processes: int) -> Callable[[Subject], str]:
    """Return the question whether a subject claims this training."""
    return lambda subject: needs_more(subject, strategy, precision, processes)
