"""Soft-weighted regularisation: the words that are not wanted, taken out of the embedding of a prompt.

Not the words' rows alone speak of them: the rows of the end tokens, of which there are many, do as well.  In the matrix
chi [K, D] of both, what they share are the large singular values, and these are made small:
    sigma' = sigma * exp(-alpha * sigma)                    to suppress
    sigma' = 1.2 * exp(0.001 * sigma) * sigma               to strengthen
Source: SuppressEOT (arXiv 2402.05375), equations 2 to 4.

No singular value decomposition of all of chi is needed.  With chi^T = Q R and R^T = U S V^T the result is
U g(S) U^T chi, where g(sigma) = sigma' / sigma: a decomposition of K <= 77 rows and columns, which is small beside D.
(The eigenvalues of chi chi^T are cheaper still, but their errors are relative to the square of the largest singular
value: where chi has a mean and rows that are all alike, 5e-12 of its largest element are wrong in float64.)
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
    triangle = torch.linalg.qr(chi.T, mode="r").R
    axes, sigma, _ = torch.linalg.svd(triangle.T, full_matrices=False)
    factor, rate = STRENGTHEN if strengthen else (1.0, -alpha)
    return (axes * (factor * (rate * sigma).exp()) @ (axes.T @ chi)).to(rows.dtype)
