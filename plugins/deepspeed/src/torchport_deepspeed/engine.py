"""The callables of a step, bound to a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torchport.errors import ConfigurationError, OperationError, UnsupportedOperationError
from torchport.plugin.strategy import Prepared
from torchport.state import GradientState

from torchport_deepspeed.wrappers import DeepSpeedOptimizerWrapper


class DeepSpeedEngineWrapper:
    """Runs `backward` and `step` of an engine; the accumulation window says where its steps are due.

    Within `accelerator.accumulate` a step is due where the window ends. Elsewhere it is due with every
    `gradient_accumulation_steps`-th backward, as the engine would count by itself.

    Attributes:
        engine: The DeepSpeed engine.

    Args:
        engine: The DeepSpeed engine.
        clipping: The total norm of its configuration; `None` where the script clips.
    """

    def __init__(self, engine: Any, clipping: float | None = None) -> None:
        self.engine = engine
        self.clipping = clipping
        self.state = GradientState()
        self.steps: int = engine.gradient_accumulation_steps()
        self.due = False
        self._counted = 0
        self._held_back = 0
        self._forced = 0
        self._trained = sum(parameter.requires_grad for parameter in engine.module.parameters())

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Let the engine compute gradients of a loss, which the accumulation window has divided already.

        Args:
            loss: A tensor of one element.
            **kwargs: `retain_graph`, as `engine.backward` takes it.
        """
        engine, due = self.engine, self._is_due()
        if due is not self.due or engine._is_gradient_accumulation_boundary is None:
            engine.set_gradient_accumulation_boundary(due)
            self.due = due
        engine.backward(loss, scale_wrt_gas=False, **kwargs)

    def _is_due(self) -> bool:
        """Whether the optimizer steps after this backward."""
        state: Any = self.state
        if self._forced:
            return True
        if self._held_back:
            return False
        if self.steps == 1 or state.inside_window:
            return bool(state.sync_gradients)
        self._counted += 1
        return self._counted % self.steps == 0

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        """Let the engine step, and return whether it changed the weights.

        Raises:
            OperationError: if there is a closure, which an engine cannot call.
        """
        if closure is not None:
            raise OperationError(
                "a DeepSpeed engine takes no closure",
                hint="an optimizer that needs none, or another strategy",
            )
        if not self.due:
            return False
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def zero_grad(self, optimizer: torch.optim.Optimizer, set_to_none: bool) -> None:
        """Do nothing: the engine clears gradients when it has stepped."""

    def discard_gradients(self) -> None:
        """Forget the gradients of a window, as the engine does with a step whose gradients overflowed."""
        optimizer = self.engine.optimizer
        self.engine.zero_grad()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(optimizer, "reset_cpu_buffers"):
            optimizer.reset_cpu_buffers()
        for held in ("averaged_gradients", "all_grad_tensors"):  # stages 1 and 2; in stage 3 only the first
            if hasattr(optimizer, held):
                setattr(optimizer, held, {})
        if hasattr(optimizer, "all_grad_tensors"):
            optimizer.micro_step_id = -1  # as step() leaves it
        self._counted = 0

    @contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        """Let backwards inside belong to a step that is due later."""
        self._held_back += 1
        try:
            yield
        finally:
            self._held_back -= 1

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Let a step be due after the backwards inside."""
        self._forced += 1
        try:
            yield
        finally:
            self._forced -= 1

    def clip_grad_norm(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Let the engine clip to a total norm in its next steps, and return the norm before.

        Raises:
            ConfigurationError: if the engine's configuration clips to another norm.
            UnsupportedOperationError: for another norm than the Euclidean, or for some of the parameters.
        """
        given = list(parameters)
        if norm_type != 2 or len(given) < self._trained:
            raise UnsupportedOperationError(
                "a DeepSpeed engine clips the Euclidean norm of all its gradients",
                found=f"norm_type={norm_type}, {len(given)} of {self._trained} parameters",
                hint="clip_grad_norm_(model.parameters(), max_norm)",
            )
        if self.clipping is not None and float(self.clipping) != float(max_norm):
            raise ConfigurationError(
                f"clip_grad_norm_(..., {max_norm}), and gradient_clipping: {self.clipping} in the configuration",
                reason="the engine clips to one of them",
                hint='gradient_clipping: "auto" leaves it to the script',
            )
        engine = self.engine
        if not self.due:
            return torch.zeros((), device=engine.device)
        engine._config.gradient_clipping = float(max_norm)
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = float(max_norm)
        return self.norm()

    def norm(self) -> torch.Tensor:
        """Return the total norm of the gradients of the step that is due."""
        optimizer, engine = self.engine.optimizer, self.engine
        if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            norm = optimizer.scaled_global_norm() / optimizer.loss_scale
        elif hasattr(optimizer, "_get_norm_groups"):  # stage 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups()) / optimizer.loss_scale
        else:
            held = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([gradient.float() for gradient in held])
            norm = norm / float(getattr(optimizer, "cur_scale", 1.0))
        return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)

    def clip_grad_value(self, parameters: Iterable[torch.Tensor], value: float) -> None:
        """Clip each element of the gradients of the step that is due."""
        if self.due:
            for gradient in self.gradients(()):
                gradient.clamp_(-value, value)

    def gradients(self, models: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
        """Return the gradients that this process holds of the step that is due.

        Raises:
            UnsupportedOperationError: where the engine keeps them elsewhere, or scaled.
        """
        optimizer = self.engine.optimizer
        if getattr(optimizer, "dynamic_loss_scale", False):
            raise self._unsupported("their scale changes by itself (fp16)")
        if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
            raise self._unsupported("they are offloaded")
        averaged = getattr(optimizer, "averaged_gradients", None)
        if averaged is not None:
            return [
                gradient for group in averaged.values() for gradient in group or () if gradient is not None
            ]
        return [p.grad for p in self.engine.module.parameters() if p.grad is not None]

    def _unsupported(self, reason: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            "the gradients of a DeepSpeed engine cannot be changed between backward and step",
            reason=reason,
            hint="loaders with a length, no num_items, no clip_grad_value_; or no offload and bf16",
        )

    def get_global_grad_norm(self) -> Any:
        """Return the total norm of the last step, as the engine reports it."""
        return self.engine.get_global_grad_norm()

    def prepared(self, models: Sequence[torch.nn.Module]) -> Prepared:
        """Bind the callables of a step to the engine."""
        no_sync: Callable[[torch.nn.Module], AbstractContextManager[Any]] = self.no_sync
        return Prepared(
            models=tuple(models),
            optimizers=(DeepSpeedOptimizerWrapper(self.engine.optimizer),),
            backward=self.backward,
            step=self.step,
            zero_grad=self.zero_grad,
            no_sync=no_sync,
            clip_grad_norm=self.clip_grad_norm,
            clip_grad_value=self.clip_grad_value,
            gradients=self.gradients,
            unscale_gradients=_nothing,
        )


def _nothing(optimizer: torch.optim.Optimizer | None) -> None:
    """Leave it: the engine divides its loss scale out when it steps."""
