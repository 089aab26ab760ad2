"""Closed forms of erasure (UCE, arXiv 2308.14761; RECE, arXiv 2407.12383) as one map of prompt embeddings.

Notation: c_e, c_g, c_p are embeddings [d] that are erased, guided to and preserved; C_e, C_g and
C_p hold them as rows.  UCE replaces the weight W of every layer that makes keys or values of a text by

    W+ = [lam W + s_e sum (W c_g) c_e^T + s_p sum (W c_p) c_p^T] A^-1,
    A = lam I + s_e sum c_e c_e^T + s_p sum c_p c_p^T

W stands on the left of every term, so W+ = W M with one M for all layers, M = I + s_e (C_g - C_e)^T C_e A^-1, of which
M - I has no higher rank than there are erased rows.  M takes a matrix product and one solution of d x d, whatever the
number of layers; W (M - I) is exactly a LoRA.  Everything here is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ranges import check_finite, check_positive, check_whole


@dataclass(frozen=True)
class LowRankMap:
    """The map M = I + left @ right of prompt embeddings, which are rows: c becomes c @ M^T.

    Attributes:
        left: [d, r], float64.
        right: [r, d], float64.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Of M - I."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """Return M, [d, d]."""
        return torch.eye(len(self.left), dtype=self.left.dtype, device=self.left.device) + self.left @ self.right

    def multiply(self, weight: Tensor) -> Tensor:
        """Return ``weight`` M, [out, d], computed in float64 and rounded once, to the weight's type."""
        wide = weight.to(self.left)
        return (wide + wide @ self.left @ self.right).to(weight)

    def map_embeds(self, embeds: Tensor) -> Tensor:
        """Return prompt embeddings [..., d] after the map: to a stock layer what they are to one that was edited."""
        wide = embeds.to(self.left)
        return (wide + wide @ self.right.T @ self.left.T).to(embeds)

    def then(self, later: LowRankMap) -> LowRankMap:
        """Return M @ M_later: an edit of the layers that this map has edited already."""
        left = torch.cat((self.left, later.left + self.left @ (self.right @ later.left)), 1)
        return _compress(left, torch.cat((self.right, later.right)))


@dataclass(frozen=True)
class Uce:
    """UCE's numbers.

    Attributes:
        lam: how much layers want to stay as they are, positive.
        erase_scale, preserve_scale: weights of the erased and of the preserved rows, at least 0.
        tokens: "all", every row of a concept to the guide's row in its place, or "last", the row of the last word piece
            to the guide's, as released.  Text encoders write a concept into all rows after it, from which "last" may
            leave it to be read.

    Raises:
        ValueError: a number out of its range, or unknown tokens.
    """

    lam: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    tokens: str = "all"

    def __post_init__(self) -> None:
        check_positive("lam", self.lam)
        for name in ("erase_scale", "preserve_scale"):
            check_finite(name, getattr(self, name), 0)
        if self.tokens not in ("last", "all"):
            raise ValueError(f"tokens must be 'last' or 'all', got {self.tokens!r}")

    def find_map(self, erased: Tensor, guides: Tensor, preserved: Tensor) -> LowRankMap:
        """Find M for rows of embeddings.

        Args:
            erased, guides: [n, d].
            preserved: [m, d]; m may be 0.

        Raises:
            ValueError: a value that is not finite, or scales so large that the edit is not.
        """
        erased, guides, preserved = (rows.to(torch.float64) for rows in (erased, guides, preserved))
        for name, rows in (("erased", erased), ("guide", guides), ("preserved", preserved)):
            if not rows.isfinite().all():
                raise ValueError(f"the {name} embeddings must be finite: look at the text encoder's weights")
        a = self.lam * torch.eye(erased.shape[1], dtype=torch.float64, device=erased.device)
        a += self.erase_scale * erased.T @ erased + self.preserve_scale * preserved.T @ preserved
        right = self.erase_scale * torch.linalg.solve(a, erased.T).T  # A is symmetric
        if not right.isfinite().all():
            raise ValueError(
                f"lam, erase_scale and preserve_scale must leave the edit finite, got {self.lam}, {self.erase_scale} "
                f"and {self.preserve_scale}"
            )
        return _compress((guides - erased).T, right)


@dataclass(frozen=True)
class Rece(Uce):
    """RECE: after UCE, find the embeddings that still bring the concept back, and erase these too.

    Attributes:
        lam, erase_scale, preserve_scale, tokens: as :class:`Uce`'s.
        rho: how much these embeddings want to be small, positive; .1 as published for nudity, 1e-3 for styles.
        epochs: how often; 3 as published for nudity, 1 for styles.

    Raises:
        ValueError: as :class:`Uce`.
    """

    rho: float = 0.1
    epochs: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rho", self.rho)
        check_whole("epochs", self.epochs)

    def find_embeds(self, gram: Tensor, found: LowRankMap, wanted: Tensor) -> Tensor:
        """Find the embeddings that make of edited layers most nearly what ``wanted`` made of the stock ones.

        It is c' = (rho I + M^T G M)^-1 M^T G c: the least squares over all layers.

        Args:
            gram: G = sum W^T W over the layers, [d, d].
            found: the map so far.
            wanted: [n, d].
        """
        m = found.dense()
        mixed = m.T @ gram
        identity = torch.eye(len(m), dtype=m.dtype, device=m.device)
        return torch.linalg.solve(self.rho * identity + mixed @ m, mixed @ wanted.to(m).T).T

    def find_map_again(
        self, gram: Tensor, erased: Tensor, guides: Tensor, preserved: Tensor, null: Tensor
    ) -> LowRankMap:
        """Find M of all epochs; ``null`` are the rows of the empty prompt, [n, d], the rest as in ``find_map``."""
        found = self.find_map(erased, guides, preserved)
        for _ in range(self.epochs):
            found = found.then(self.find_map(self.find_embeds(gram, found, erased), null, preserved))
        return found


#: Name -> what it means.
METHODS: dict[str, Uce] = {"uce": Uce(), "rece": Rece()}


def _compress(left: Tensor, right: Tensor) -> LowRankMap:
    """Write left @ right with as few columns as it has in float64: those of tokens that only pad are nearly equal."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sizes, v = torch.linalg.svd(r_left @ r_right.T)
    least = sizes.max() * max(len(left), len(sizes)) * torch.finfo(sizes.dtype).eps
    kept = int((sizes > least).sum())
    roots = sizes[:kept].sqrt()
    return LowRankMap(q_left @ u[:, :kept] * roots, roots[:, None] * (v[:kept] @ q_right.T))
