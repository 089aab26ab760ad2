"""What the machine can do at best, measured in the same run: the roof that operators are compared with."""

from __future__ import annotations

import torch
from interleaved import measure

from difffast import ops
from difffast.ops.linear import through_onednn

_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
_WIDTHS = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.empty(_COPIED[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, rounds=7, device=device)["copy"]
    return 2 * source.numel() / min(seconds)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of square matrix products, of the fastest size and way; a multiply-add counts as two."""
    rates = []
    for n in _WIDTHS[device]:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        products = {"matmul": lambda a=a, b=b: a @ b}
        if device == "cpu" and dtype == torch.float32 and ops.missing("onednn") is None:
            products["oneDNN"] = lambda a=a, b=b: through_onednn(a, b, None)
        seconds = measure(products, rounds=15, device=device)
        rates.append(2 * n**3 / min(map(min, seconds.values())))
    return max(rates)


def ceilings(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """``copy_bytes_per_s``, and ``matmul_flop_per_s <dtype>`` of each dtype."""
    rates = {f"matmul_flop_per_s {str(d).removeprefix('torch.')}": matmul_rate(device, d) for d in dtypes}
    return {"copy_bytes_per_s": copy_bandwidth(device), **rates}
