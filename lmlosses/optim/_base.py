"""The loop that all optimizers share; a subclass says what to remember and how to update."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UpdateRule(torch.optim.Optimizer):
    """An optimizer given by its state and its update of one parameter.

    The base walks over groups and parameters, leaves those without a gradient alone, refuses
    sparse and complex gradients, negates the gradient under ``maximize``, and counts steps in a
    CPU tensor so that nothing waits for a device.
    """

    @abstractmethod
    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """What is remembered about a parameter before its first step."""

    @abstractmethod
    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move ``param`` in place; ``state["step"]`` already counts this step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: If a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)
        return loss

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        if grad.is_sparse or grad.is_complex():
            raise TypeError(
                f"{type(self).__name__} takes dense real gradients; "
                f"got {grad.layout}, {grad.dtype}"
            )
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(self.init_state(param))
        state["step"] += 1
        self.update(param, -grad if group["maximize"] else grad, state, group)
