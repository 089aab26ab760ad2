"""Benchmark cases whose providers take as long as they are told, by a clock that only moves when told."""

import torch
from registry import Case, Provider, Run

TRUTH = torch.arange(1.0, 9.0)


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def taking(clock, seconds, result=TRUTH, outputs=None):
    """A provider's ``enter``: each call takes so many seconds; ``result`` and ``outputs`` may depend on the call."""
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        clock.now += seconds
        return Run(
            result(calls) if callable(result) else result, outputs=outputs(calls) if callable(outputs) else outputs
        )

    return lambda subject, stack: call


def raising(error):
    def enter(subject, stack):
        raise error

    return enter


def case(*providers, **options):
    defaults = {
        "group": "suite",
        "name": "a case",
        "shapes": {"steps": 50},
        "dtype": "float32",
        "device": "cpu",
        "build": lambda: None,
        "timed": "seconds",
        "rounds": (2, 4),
    }
    return Case(providers=providers, **{**defaults, **options})


def everybody(clock, *others, **options):
    return case(Provider("stock", "stock", taking(clock, 2.0, outputs=50)), *others, **options)
