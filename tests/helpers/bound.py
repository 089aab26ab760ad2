"""A prompt with two things, the settings that bind it, and a run with them."""

from binding_by_hand import Numbers, Things
from sampling import latents

from difffast import SemanticBinding, patched

PROMPT = "a [red ox] by a [elk in fog]"
# One token a letter: a red ox by a elk in fog.
THINGS = Things(
    "a red ox by a elk in fog",
    (((5, 6), (2, 3, 4)), ((10, 11, 12), (13, 14, 15, 16, 17))),
    ("a red ox", "a elk in fog"),
    "an ox by an elk",
)
LAYERS = tuple(f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)) + tuple(
    f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1, 2)
)
STEPS = 8
OPTIONS = {"step_size": 0.1, "bind_step_size": 3.0}
#: No other loss than the entropy, and no early end.
FIXED = {"losses": {"entropy": 1}, "thresholds": (), "iterations": 2}


def binding(**options):
    return SemanticBinding(**{"bind_steps": 2, "focus_steps": 3, "replace_step": 1, **OPTIONS, **FIXED, **options})


def numbers(**options):
    """The same for the method written out."""
    return Numbers(**{"steps": STEPS, "bind": 2, "focus": 3, "replace": 1, "iterations": 2, **OPTIONS, **options})


def run(pipe, config, prompt=PROMPT, preset="exact", **options):
    with patched(pipe, preset, binding=config) as report:
        return latents(pipe, prompt, steps=STEPS, **options), report
