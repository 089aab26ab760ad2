"""What is no picture, prompt or inversion is said by name and kind, before anything runs."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import picture, scheduler

import difffast
from difffast import Inversion, invert
from difffast.steering import generate_edict
from difffast.steering.editing.config import EditConfig

PROMPT = "a ox in fog"


@pytest.fixture
def plain64(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


@pytest.fixture
def saved(tmp_path):
    """A file of an inversion, as (path, tensors, its fields)."""
    path = tmp_path / "file"
    Inversion("ddim", PROMPT, 7.5, (32, 32), torch.zeros(3, 4, 8, 8), 2).save(path)
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["inversion"])
    return path, {"trajectory": torch.zeros(3, 4, 8, 8)}, fields


def write(path, tensors, **metadata):
    save_file(tensors, path, {"format": "difffast inversion 1", **metadata})


def test_a_file_without_all_its_fields_is_damaged(saved):
    path, tensors, fields = saved
    write(path, tensors, inversion=json.dumps(fields))
    assert Inversion.load(path).size == (32, 32)
    write(path, tensors)
    with pytest.raises(ValueError, match=r"is damaged: its metadata must hold .*, got none"):
        Inversion.load(path)
    for text in ("{", "[1]"):
        write(path, tensors, inversion=text)
        with pytest.raises(ValueError, match="is damaged: its metadata must hold"):
            Inversion.load(path)
    for name in fields:
        write(path, tensors, inversion=json.dumps({k: v for k, v in fields.items() if k != name}))
        with pytest.raises(ValueError, match="is damaged: its metadata must hold method, prompt"):
            Inversion.load(path)
    for name, value in (("steps", "2"), ("method", "ddpm"), ("size", None), ("guidance", [])):
        write(path, tensors, inversion=json.dumps({**fields, name: value}))
        with pytest.raises(ValueError, match=f"is damaged: its metadata say that {name} is"):
            Inversion.load(path)
    for method in ("null", "style"):
        write(path, tensors, inversion=json.dumps({**fields, "method": method}))
        with pytest.raises(ValueError, match="is damaged: it has not what each of its 0 steps has found"):
            Inversion.load(path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": ["elk"]}, "prompt must be one text, got list"),
        ({"prompt": None}, "prompt must be one text, got NoneType"),
        ({"image": torch.zeros(3, 32, 32)}, "image must be a PIL image, got Tensor"),
        ({"image": "cat.png"}, "image must be a PIL image, got str"),
        ({"guidance": "7"}, "guidance must be a number, got str"),
        ({"guidance": True}, "guidance must be a number, got bool"),
        ({"checkpoint": 3}, "checkpoint must be a path, got int"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(plain64, options, error):
    with pytest.raises(TypeError, match=error):
        invert(plain64, **{"image": picture(32), "prompt": PROMPT, **options})


def test_pictures_of_other_modes_are_converted(plain64):
    plain = picture(32)
    for mode in ("RGBA", "L", "P"):
        other = plain.convert(mode)
        found = invert(plain64, other, PROMPT, "ddcm", steps=2)
        assert torch.equal(found.trajectory, invert(plain64, other.convert("RGB"), PROMPT, "ddcm", steps=2).trajectory)


def test_an_empty_prompt_is_a_prompt_for_edict(plain64):
    found = invert(plain64, picture(32), PROMPT, "edict", steps=2, guidance=3.0)
    own, empty = (generate_edict(plain64, found, prompt) for prompt in (None, ""))
    assert own != empty
    with pytest.raises(TypeError, match="prompt must be one text, got list"):
        generate_edict(plain64, found, [PROMPT])


def test_edits_name_what_is_no_inversion_pair_or_mapping(plain64):
    with (
        pytest.raises(TypeError, match=r"inversion must be what difffast\.invert returns, got str"),
        difffast.edit(plain64, PROMPT, PROMPT, inversion="file"),
    ):
        pass
    with pytest.raises(TypeError, match="reweight must be a mapping of words to factors, got list"):
        EditConfig(PROMPT, PROMPT, reweight=["ox"])
    with pytest.raises(ValueError, match="blend must be a word of the source and one of the target, got 5"):
        EditConfig(PROMPT, PROMPT, blend=5)
