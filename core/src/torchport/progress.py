"""A progress bar for the job instead of one for each process."""

from __future__ import annotations

from typing import Any

from torchport.rank import current_topology


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """Return a progress bar (`tqdm.auto.tqdm`).

    Args:
        *args: As for `tqdm.auto.tqdm`.
        main_process_only: Whether only the main process shows it; on the others it only iterates.
        **kwargs: As for `tqdm.auto.tqdm`; `disable=True` hides it everywhere.
    """
    from tqdm.auto import tqdm as bar

    if main_process_only and not kwargs.get("disable") and current_topology().rank != 0:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
