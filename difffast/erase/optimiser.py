"""AdamW whose updates are not lost to a narrow type: bfloat16 parameters have master weights in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

#: What AdamW keeps of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class AdamW:
    """torch's AdamW, on master weights where parameters are narrower than float32.

    bfloat16 keeps 8 bits: around 0.1, neighbours are 5e-4 apart, and steps of 1e-5 round to nothing.  The master
    weights gather them, and the parameters are their rounding after every step.  Parameters that somebody else has
    changed since are taken over at the next step, as torch's AdamW does.

    Args:
        parameters: what is trained.
        learning_rate, weight_decay: as torch's.

    Attributes:
        masters: the weights in at least float32; wide parameters are their own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
        self.masters = tuple(
            p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype))
            for p, dtype in zip(parameters, wide, strict=True)
        )
        self._parameters = tuple(parameters)
        self._rounded = [(p, m) for p, m in zip(parameters, self.masters, strict=True) if p is not m]
        self._adamw = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def set_weight_decay(self, weight_decay: float) -> None:
        """Let later steps have another weight decay."""
        for group in self._adamw.param_groups:
            group["weight_decay"] = weight_decay

    def step(self) -> None:
        """Make a step with the gradients of the parameters."""
        self.take_over()
        for parameter, master in self._rounded:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._adamw.step()
        with torch.no_grad():
            for parameter, master in self._rounded:
                parameter.copy_(master)
                master.grad = None

    @torch.no_grad()
    def take_over(self) -> None:
        """Let the masters of values that were changed since the last step be these values."""
        for parameter, master in self._rounded:
            same = parameter == master.to(parameter.dtype)
            master.copy_(torch.where(same, master, parameter.to(master.dtype)))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def moments(self) -> list[dict[str, Tensor]]:
        """Return the state of each parameter by name; one that never had a gradient has none."""
        states = [self._adamw.state.get(master, {}) for master in self.masters]
        return [{key: state[key] for key in MOMENTS if key in state} for state in states]

    @torch.no_grad()
    def load(self, masters: Sequence[Tensor], moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Go back to masters and to what :meth:`moments` has returned."""
        for parameter, master, value in zip(self._parameters, self.masters, masters, strict=True):
            master.copy_(value)
            parameter.copy_(master)
        groups = self._adamw.state_dict()["param_groups"]
        states = {number: dict(state) for number, state in enumerate(moments) if state}
        self._adamw.load_state_dict({"state": states, "param_groups": groups})
