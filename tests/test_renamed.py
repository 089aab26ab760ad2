"""Names that an earlier README has shown work, and say what to write instead."""

import pytest
from sampling import latents

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, Plan, patch


def renamed(message):
    return pytest.warns(DeprecationWarning, match=message)


def test_classes_and_functions():
    with renamed(r"difffast.GuidanceReuse is now difffast.CfgReuse"):
        assert difffast.GuidanceReuse is CfgReuse
    with renamed(r"difffast.plan_for is now difffast.tune"):
        assert difffast.plan_for is difffast.tune
    with pytest.raises(AttributeError, match="no attribute 'plan_form'"):
        _ = difffast.plan_form


def test_options(pipe):
    with renamed(r"patch\(guidance=\) is now patch\(cfg=\)"):
        report = patch(pipe, "exact", guidance=CfgReuse(2))
    assert report.cfg == CfgReuse(2)
    latents(pipe)
    assert report.last_run.halves > 0
    with renamed(r"patch\(guidance=\)"), pytest.raises(TypeError, match="guidance is the old name of cfg"):
        patch(pipe, "exact", guidance=CfgReuse(2), cfg=CfgReuse(3))


@pytest.mark.parametrize("kind", [EncoderPropagation, FeatureReuse])
def test_degree(kind):
    with renamed(rf"{kind.__name__}\(order=\) is now {kind.__name__}\(extrapolate=\)"):
        assert kind(order=2) == kind(extrapolate=2)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    with renamed(r"Plan.picture is now Plan.plot"):
        FeatureReuse(3).plan(10).picture(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_plans_kept_as_json_are_read():
    kept = (
        '{"total": 10, "keys": [0, 3, 6, 9], "max_batch": 1, "batches": null, "reuse": {"interval": 3, "branch": 1, '
        '"schedule": "uniform", "center": 0.3, "power": 1.4, "order": 2}, "optimised": [0], "halves": []}'
    )
    plan = Plan.from_json(kept)
    assert plan == FeatureReuse(3, branch=1, extrapolate=2).plan(10).add_full_steps([0])
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"propogation": None},
            TypeError,
            r"unknown option 'propogation' \(did you mean 'propagation'\?\); available: ",
        ),
        ({"cfg_reuse": None}, TypeError, r"unknown option 'cfg_reuse'"),
        ({"preset": "Turbo"}, ValueError, r"unknown preset 'Turbo' \(did you mean 'turbo'\?\); available: exact, "),
        ({"preset": "faster_diffusion"}, ValueError, r"\(did you mean 'faster-diffusion'\?\)"),
    ],
)
def test_misspelt_names_get_the_nearest_real_one(pipe, options, error, message):
    with pytest.raises(error, match=message):
        patch(pipe, **options)
