"""Measure which way of sharing work between steps is the fastest within a budget of error.

python examples/tune_for_a_budget.py --steps 50 --budget 32
"""

import argparse
from pathlib import Path

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, MeasuredPlan, OutputForecast
from difffast.tune import Candidate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--budget", type=float, default=32.0, help="least median PSNR against stock, in dB")
parser.add_argument("--repeats", type=int, default=2, help="how often each candidate is timed on each prompt")
parser.add_argument("--out", type=Path, default=Path("tuning"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

pipe = difffast.models.embedded_pipeline()
tuning = difffast.tune(
    pipe,
    arguments.steps,
    budget=arguments.budget,
    prompts=["a red circle and a blue square", "a dotted green star"],
    candidates=[  # None would search for plans, which takes a few minutes
        OutputForecast(key_steps=2),
        MeasuredPlan("turbo"),
        EncoderPropagation(key_steps=3),
        FeatureReuse(interval=2),
        Candidate(FeatureReuse(interval=3), CfgReuse(3)),
    ],
    repeats=arguments.repeats,
    cache=arguments.out / "measurements.json",  # a later call goes on from it
)
print(tuning)
tuning.plot(arguments.out / "front.png")  # needs matplotlib
print(difffast.patch(pipe, **tuning.options))
