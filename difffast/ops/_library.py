"""The schemas of all operators, and what their definitions share.

They exist without the compiled extension, which only adds implementations.
"""

from __future__ import annotations

from typing import Any

import torch

#: Holds every schema, fake, formula and kernel that Python registers.
LIBRARY = torch.library.Library("difffast", "DEF")


def refuse_second_derivative(operator: str, backward: str) -> None:
    """Make differentiating the backward operator ``backward`` of ``operator`` an error.

    Without a formula PyTorch would take the gradient for a constant.
    """

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(
            f"{operator}: the kernels' gradient cannot be differentiated again; "
            f"use_backend('reference', '{operator}') can"
        )

    torch.library.register_autograd(f"difffast::{backward}", refuse, lib=LIBRARY)
