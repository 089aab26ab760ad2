"""Soft-weighted regularisation: the words that are not wanted, taken out of the embedding of a prompt.

Not the words' rows alone speak of them: the rows of the end tokens, of which there are many, do as well.  In the matrix
chi [K, D] of both, what they share are the large singular values, and these are made small:
    sigma' = sigma * exp(-alpha * sigma)                    to suppress
    sigma' = 1.2 * exp(0.001 * sigma) * sigma               to strengthen
Source: SuppressEOT (arXiv 2402.05375), equations 2 to 4.

No singular value decomposition is needed.  With chi chi^T = Q L Q^T the result is Q g(sqrt(L)) Q^T chi, where
g(sigma) = sigma' / sigma: an eigenvalue problem of K <= 77 rows, which is small beside D.  It is solved in float64,
because the product squares the condition number.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Factor and exponent with which words are strengthened.
STRENGTHEN = (1.2, 0.001)


def regularise(rows: Tensor, *, strengthen: bool = False, alpha: float = 1.0) -> Tensor:
    """Return rows [K, D] whose singular values are regularised as above, in their own dtype.

    Args:
        rows: chi.
        strengthen: whether what the rows share is made stronger instead of weaker.
        alpha: how fast large singular values fall.  Values above 1 / alpha fall the more the larger they are, so that
            the result is not proportional to ``rows``.
    """
    chi = rows.to(torch.float64)
    squares, axes = torch.linalg.eigh(chi @ chi.T)
    sigma = squares.clamp(min=0).sqrt()
    factor, rate = STRENGTHEN if strengthen else (1.0, -alpha)
    return (axes * (factor * (rate * sigma).exp()) @ (axes.T @ chi)).to(rows.dtype)
