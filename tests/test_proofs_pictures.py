"""Whatever is wrong with the cache folder or with processes: a note, PyTorch's operators, and the same picture."""

import errno
import json
import subprocess

import pytest
import torch
from sampling import latents

import difffast
from difffast.ops import _local
from difffast.proofs import store

CPU = torch.device("cpu")


def draw(pipe):
    with difffast.patched(pipe, "exact"):
        return latents(pipe, steps=3)


def _write(content):
    path = _local.find_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


def _folder(cache):
    _local.find_path(CPU).mkdir(parents=True)


def _damaged(cache):
    _write(b'{"schema": 1, "sets"')


def _binary(cache):
    _write(bytes(range(256)))


def _newer(cache):
    _write(json.dumps({"schema": 99}).encode())


def _of_another_card(cache):
    proofs = {"cross_attention float32 2x4x64x8,2x4x77x8,2x4x77x8 any sink=0 eager": {"choice": "cuda"}}
    facts = {"device": "NVIDIA H200"}
    _write(json.dumps({"schema": 1, "sets": {"0" * 16: {"facts": facts, "proofs": proofs}}}).encode())


def _no_folder(cache):
    cache.write_text("a file where the folder should be")


BAD = (_folder, _damaged, _binary, _newer, _of_another_card)


@pytest.mark.parametrize("spoil", BAD, ids=lambda each: each.__name__.strip("_"))
def test_a_bad_file_gives_a_note_and_the_same_picture(pipe, proof_cache, spoil):
    expected = draw(pipe)
    spoil(proof_cache)
    _local.forget_tables()
    with pytest.warns(UserWarning, match=r"cannot be read|is damaged|has schema 99|no proofs for this installation"):
        assert torch.equal(draw(pipe), expected)


def test_a_folder_that_cannot_be_written_gives_a_note_and_the_same_picture(pipe, proof_cache):
    expected = draw(pipe)
    _no_folder(proof_cache)
    _local.forget_tables()
    assert torch.equal(draw(pipe), expected)
    assert "cannot be written" in store.merge(CPU, {"x eager": {"choice": "sdpa"}})
    assert torch.equal(draw(pipe), expected)


def test_without_processes_proving_leaves_a_note_and_the_same_picture(pipe, proof_cache, monkeypatch):
    expected = draw(pipe)

    def fail(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(subprocess, "Popen", fail)
    report = difffast.prove(pipe)
    assert (report.proved, len(report.left) > 0) == (0, True)
    assert "no process can be started to prove kernels in" in report.notes[0]
    assert torch.equal(draw(pipe), expected)


def test_a_proof_that_says_nonsense_gives_the_same_picture(pipe, proof_cache):
    expected = draw(pipe)
    keys = [key.text("eager") for key in _collect(pipe)]
    store.merge(CPU, {text: {"choice": ("nonsense", None, "cuda", 7)[i % 4]} for i, text in enumerate(keys)})
    assert torch.equal(draw(pipe), expected)


def _collect(pipe):
    from difffast.proofs import collect

    return collect.collect(collect.make_dry(pipe.unet, torch.float32, CPU), 2, CPU, decoders=())
