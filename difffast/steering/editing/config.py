"""What an edit by prompt does and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KINDS = ("replace", "refine")
MODES = ("paper", "reference")
#: The authors' share of steps with values from the picture.
_VALUES = 0.6


@dataclass(frozen=True)
class EditConfig:
    """Change the picture of one prompt into that of another, by attention (Prompt-to-Prompt, arXiv 2208.01626).

    Args:
        source: the prompt of the picture.
        target: what it is to become.
        kind: "replace" for prompts with as many words, "refine" for words that are added or left out.  None replaces
            where the numbers of words are equal.
        cross: the share of the steps, from the first, at which words of the target that the source has as well, or
            that stand for its words, look where the source's do.
        self_: the same for the pixels' attention to each other, in layers of at most a quarter of the latents' height
            and width, rounded up.  The report says where a UNet has none.
        uncond_self: the same for the unconditional half of guidance's batch, up to half of the latents' height and
            width (P2Plus, StyleDiffusion, arXiv 2303.15649); 0 leaves it alone.
        values: with an inversion by "style", the share of the steps at which the target's values come from the picture
            as well; None: 0.6, or 0 without such an inversion.
        reweight: words of the target and by how much their maps are multiplied.
        blend: a word of the source and one of the target: outside of where they are, the picture stays.  They are
            looked for in layers of a quarter of the latents' height and width; a UNet without such layers is refused.
            None: the whole picture may change.
        blend_threshold: the share of the largest value above which a word is there.
        blend_from: the share of the steps after which ``blend`` begins.
        mode: "paper", or "reference", which has what the released code does otherwise: rows after the last replaced
            word, or after a refined prompt's end token, do not move with it, and the windows are
            int(cross * (steps + 1)) and int(self_ * steps) steps long.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    source: str
    target: str
    kind: Literal["replace", "refine"] | None = None
    cross: float = 0.8
    self_: float = 0.4
    uncond_self: float = 0.0
    values: float | None = None
    reweight: Mapping[str, float] | None = None
    blend: tuple[str, str] | None = None
    blend_threshold: float = 0.3
    blend_from: float = 0.2
    mode: Literal["paper", "reference"] = "paper"

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be one text, got {type(getattr(self, name)).__name__}")
        if self.kind not in (None, *KINDS):
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, None, got {self.kind!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("cross", "self_", "uncond_self", "values", "blend_threshold", "blend_from"):
            value = getattr(self, name)
            if value is None and name == "values":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share, 0 .. 1, got {value!r}")
        if self.reweight is not None and not isinstance(self.reweight, Mapping):
            raise TypeError(f"reweight must be a mapping of words to factors, got {type(self.reweight).__name__}")
        for word, factor in (self.reweight or {}).items():
            if not isinstance(word, str) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
                raise ValueError(f"reweight must name words and finite factors, got {word!r}: {factor!r}")
        if self.blend is not None:
            pair = isinstance(self.blend, (tuple, list)) and len(self.blend) == 2
            if not pair or not all(isinstance(word, str) for word in self.blend):
                raise ValueError(f"blend must be a word of the source and one of the target, got {self.blend!r}")

    def count_cross_steps(self, total: int) -> int:
        """Return at how many steps of ``total`` cross-attention is edited."""
        return min(total, int(self.cross * (total + 1)) if self.mode == "reference" else round(self.cross * total))

    def count_self_steps(self, total: int, *, unconditional: bool = False) -> int:
        """Return at how many steps of ``total`` self-attention is, or that of the unconditional half."""
        share = self.uncond_self if unconditional else self.self_
        return int(share * total) if self.mode == "reference" else round(share * total)

    def count_value_steps(self, total: int) -> int:
        """Return at how many steps of ``total`` the target's values come from an inverted picture."""
        share = _VALUES if self.values is None else self.values
        return int(share * total) if self.mode == "reference" else round(share * total)

    def count_edited_steps(self, total: int) -> int:
        """Return after how many steps of ``total`` all attention is the target's own."""
        if self.blend is not None:
            return total  # where words are is asked up to the end
        both = (self.count_self_steps(total, unconditional=u) for u in (False, True))
        return max(self.count_cross_steps(total), *both)
