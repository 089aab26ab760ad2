"""What each preset would run in a schedule, without running anything; the plans as JSON and as drawings.

python examples/presets_and_plans.py --steps 30
"""

import argparse
from pathlib import Path

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("plans"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

pipe = difffast.models.embedded_pipeline()
for preset in difffast.presets.PRESETS:
    plan = difffast.patch(pipe, preset).plan(arguments.steps)
    print(
        f"{preset}: {len(plan.key_steps)} of {plan.total} steps are key steps, {len(plan.halves)} run half of the batch"
    )
    (arguments.out / f"{preset}.json").write_text(plan.to_json())
    plan.plot(arguments.out / f"{preset}.png")  # needs matplotlib
difffast.unpatch(pipe)

# A saved plan is data: it can be read, compared and shown without a pipeline.
print(difffast.Plan.from_json((arguments.out / "balanced.json").read_text()))
