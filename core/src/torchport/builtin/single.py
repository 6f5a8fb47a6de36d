"""The strategy for one process."""

from __future__ import annotations

from torchport.plugin.binding import bind_step
from torchport.plugin.strategy import Prepared, PrepareRequest, Strategy


class SingleStrategy(Strategy):
    """One process, the model as it is, on the device."""

    supports_local_steps = True

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Move models to the device and bind them to the precision."""
        context = request.context
        models = [
            context.precision.apply(model.to(context.device) if place else model, context)
            for model, place in zip(request.models, request.device_placement, strict=True)
        ]
        return bind_step(request, models)
