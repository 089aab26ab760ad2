"""Edits at sizes whose levels round up, and in UNets that lack a level, against maps by processors that know theirs."""

import pytest
import torch
import zoo
from attention_by_hand import attend
from sampling import largest, latents, scheduler
from tolerances import EXACT_FLOAT64
from torch.nn import functional

import difffast
from difffast import patched
from difffast.steering.editing.blend import LocalBlend
from difffast.steering.editing.method import PromptEdit

#: One token a letter: a=1 ox=2 3; a=1 elk=2..4.
SOURCE, TARGET = "a ox", "a elk"
STEPS = 4
DOUBLE = {"dtype": torch.float64}
#: By block of a UNet of three levels.
LEVELS = {"down_blocks.0": 0, "down_blocks.1": 1, "down_blocks.2": 2, "mid_block": 2}
LEVELS |= {"up_blocks.0": 2, "up_blocks.1": 1, "up_blocks.2": 0}


@pytest.fixture
def three(pipe64):
    pipe64.unet = zoo.three_levels().double()
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


class ByLevel:
    """A processor that copies the source's self-attention maps, and keeps those of cross-attention at level 2."""

    def __init__(self, level, seen):
        self.level, self.seen = level, seen

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        def edit(p):
            if encoder_hidden_states is None:
                if self.level >= 2:
                    p = torch.cat([p[:-1], p[-2:-1]])
                return torch.cat([p[:1], p[:1], p[2:]]) if self.level >= 1 else p
            if self.level == 2:
                self.seen.append(p[-2:].mean(1))
            return p

        return attend(layer, hidden, encoder_hidden_states, edit)


def by_hand(pipe, start, size, blend):
    """Final latents [2, C, h, w]; self-attention copied at all steps, blended by "a" and "a" from a half of them on."""
    plain, seen = pipe.unet.attn_processors, []
    levels = {name: next(v for k, v in LEVELS.items() if name.startswith(k)) for name in plain}
    pipe.unet.set_attn_processor({name: ByLevel(level, seen) for name, level in levels.items()})
    small = [-(-side // 4) for side in start.shape[-2:]]

    def after(_pipe, step, _timestep, tensors):
        if blend and step >= STEPS / 2:
            maps = sum(seen)[:, :, 1].unflatten(1, small)
            wide = functional.max_pool2d(maps[:, None], 3, 1, 1)
            large = functional.interpolate(wide, start.shape[-2:])
            there = (large / large.amax((2, 3), keepdim=True) > 0.95).any(0, keepdim=True)
            z = tensors["latents"]
            tensors["latents"] = torch.cat([z[:1], z[:1] + there * (z[1:] - z[:1])])
        return tensors

    try:
        return latents(pipe, [SOURCE, TARGET], steps=STEPS, latents=start, callback_on_step_end=after, **size)
    finally:
        pipe.unet.set_attn_processor(plain)


@pytest.mark.parametrize("sides", [(8, 8), (10, 6), (18, 10)])
def test_levels_that_round_up_are_edited_and_looked_at(three, sides):
    size = {"height": 4 * sides[0], "width": 4 * sides[1]}
    start = torch.randn(1, 4, *sides, **DOUBLE).repeat(2, 1, 1, 1)
    given = {"cross": 0.0, "self_": 1.0, "uncond_self": 1.0}
    found = []
    for blend in (None, ("a", "a")):
        more = {"blend": blend, "blend_threshold": 0.95, "blend_from": 0.5}
        with difffast.edit(three, SOURCE, TARGET, **given, **more) as edited:
            found.append(latents(three, edited.prompts, steps=STEPS, latents=start, **size))
        assert largest(found[-1], by_hand(three, start, size, blend)) <= EXACT_FLOAT64
    with difffast.edit(three, SOURCE, TARGET, cross=0.0, self_=0.0) as edited:
        plain = latents(three, edited.prompts, steps=STEPS, latents=start, **size)
    assert largest(found[0], plain) > 1e-4
    if sides == (18, 10):  # a window of 3x3 covers maps of 2x2 and 3x2
        assert largest(*found) > 1e-4


def test_a_unet_without_the_level_is_refused_or_named(pipe64):
    """The fixture's UNet has two levels."""
    before = type(pipe64.unet)
    with (
        pytest.raises(ValueError, match=r"cross-attention at level 2 of the UNet.* has it at \[0, 1\]"),
        difffast.edit(pipe64, SOURCE, TARGET, blend=("a", "a")),
    ):
        pass
    assert type(pipe64.unet) is before
    said = "self_ edits nothing: it needs layers at level 2 or deeper, got [0, 1]"
    for options, is_said in (({}, True), ({"self_": 0.0, "uncond_self": 0.5}, False)):
        with patched(pipe64, "exact", steering=PromptEdit(SOURCE, TARGET, **options)) as report:
            assert (said in str(report)) == ("edits nothing" in str(report)) == is_said


def test_a_blend_without_maps_is_no_blend():
    with pytest.raises(ValueError, match="blend needs a cross-attention layer of 3x2 pixels"):
        LocalBlend(0.3).mix(torch.zeros(2, 4, 9, 8))
