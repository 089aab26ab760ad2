"""What a user sees of attention maps: words, the prompt's own rows, a summary, a picture."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from sampling import latents

from difffast import AttentionMaps, SafeGuard, SemanticBinding, collect_maps, models, patched
from difffast.models.tokenizer import clip_tokenizer, learn_merges
from difffast.steering.prompt_calls import read_prompt_words
from difffast.steering.prompts import get_indices, parse_prompt
from difffast.words import read_words

PROMPT = "a cat, and a cat by a teddy bear"
WORDS = ("a", "cat", "and", "by", "teddy", "bear", "dog")
#: Where the words of PROMPT are, the start token being 0.
PLACES = {"a": (1, 5, 8), "cat": (2, 6), ",": (3,), "and": (4,), "by": (7,), "teddy": (9,), "bear": (10,)}


@pytest.fixture
def pipe(pipe):
    """The small pipeline with a token for each of a few words."""
    pipe.tokenizer = clip_tokenizer(learn_merges(WORDS))
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    return pipe


@pytest.fixture
def maps(pipe):
    """All maps of two images of PROMPT."""
    with collect_maps(pipe) as maps:
        latents(pipe, PROMPT, steps=2, num_images_per_prompt=2)
    return maps


def test_words_are_found_where_they_are():
    words = read_words(clip_tokenizer(learn_merges(WORDS)), PROMPT)
    assert [word for word, _ in words.words] == ["a", "cat", ",", "and", "a", "cat", "by", "a", "teddy", "bear"]
    assert {word: words.find(word) for word in PLACES} == PLACES
    assert words.find("Teddy Bear") == (9, 10)
    assert words.find("a cat") == (1, 2, 5, 6)
    for missing in ("at", "dog", "ted", "cat teddy", "", "a cat by teddy"):
        with pytest.raises(
            ValueError, match=r"no word '.*' in the prompt 'a cat, and .*whose words are 'a', 'cat', ','"
        ):
            words.find(missing)


def test_words_of_several_pieces_are_whole_words():
    words = read_words(clip_tokenizer(), "a cat, cats")  # a token for each letter
    assert words.words == (("a", (1,)), ("cat", (2, 3, 4)), (",", (5,)), ("cats", (6, 7, 8, 9)))
    assert words.find("cat") == (2, 3, 4)
    with pytest.raises(ValueError, match="no word 'at'"):
        words.find("at")


def test_words_of_textual_inversion_are_words_with_all_their_vectors(pipe):
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<toy>": torch.zeros(2, width)}, token="<toy>")
    pipe.load_textual_inversion({"<one>": torch.zeros(1, width)}, token="<one>")
    text = "a <toy> cat by <one> and a <toy>, teddy"
    words = read_words(pipe.tokenizer, pipe.maybe_convert_prompt(text, pipe.tokenizer))
    assert [word for word, _ in words.words] == ["a", "<toy>", "cat", "by", "<one>", "and", "a", "<toy>", ",", "teddy"]
    expected = {"<toy>": (2, 3, 9, 10), "cat": (4,), "<one>": (6,), "and": (7,), "<toy> cat": (2, 3, 4), "teddy": (12,)}
    assert {word: words.find(word) for word in expected} == expected
    with collect_maps(pipe, tokens=["cat"]) as maps:
        latents(pipe, text, steps=1)
    assert "<toy> 2 3, cat 4" in str(maps)
    assert get_indices(pipe, "a [<toy> cat]") == {1: "a</w>", 2: "<toy>", 3: "<toy>_1", 4: "cat</w>"}
    (subject,) = parse_prompt(pipe, "a <toy> cat", [((4,), (2, 3))]).subjects
    assert get_indices(pipe, subject.phrase) == {1: "<toy>", 2: "<toy>_1", 3: "cat</w>"}


def test_reading_words_leaves_the_pipelines_tokenizer_alone(pipe):
    """Another thread may be in the middle of a call with it."""
    backend = pipe.tokenizer.backend_tokenizer
    for padding in ("max_length", "do_not_pad"):
        pipe.tokenizer("cat", padding=padding, truncation=padding == "max_length")
        state = backend.padding, backend.truncation
        read_prompt_words(pipe, PROMPT)[0][0].find("cat")
        parse_prompt(pipe, "a [cat by a bear]")
        with patched(pipe, "exact", steering=SafeGuard("bear")):
            assert (backend.padding, backend.truncation) == state


class Pieces:
    """A tokenizer as SentencePiece's are: a mark at the start of words, no start token, punctuation without a mark."""

    padding_side, model_max_length, all_special_ids = "right", 77, (0,)

    def tokenize(self, text):
        return [piece for word in text.split() for piece in ("▁" + word[:3], word[3:4], word[4:]) if piece]

    def __call__(self, text, **_):
        self.known = self.tokenize(text)
        return types.SimpleNamespace(input_ids=[*range(1, len(self.known) + 1), 0])

    def convert_ids_to_tokens(self, ids):
        return ["</s>" if each == 0 else self.known[each - 1] for each in ids]


def test_words_of_other_tokenizers():
    words = read_words(Pieces(), "cat, teddy")
    assert words.words == (("cat", (0,)), (",", (1,)), ("teddy", (2, 3, 4)))
    assert words.find("cat") == (0,)
    assert words.find("teddy") == (2, 3, 4)
    left = Pieces()
    left.padding_side = "left"
    with pytest.raises(ValueError, match="Pieces pads on the left"):
        read_words(left, "cat")


def test_the_prompts_own_rows_come_by_default(maps):
    layer = maps.layers[0]
    both, own, other = (maps.mean(layer, rows=rows) for rows in ("all", "prompt", "negative"))
    assert both.shape[0] == 4
    assert torch.equal(own, both[2:])
    assert torch.equal(other, both[:2])
    assert torch.equal(maps.mean(layer), own)
    height, width = maps.picture_size(own.shape[1])
    assert torch.equal(maps.grid(layer)[1, 5], own[1, :, 5].view(height, width))
    assert torch.equal(maps.grid(layer, rows="negative")[0, 5], both[0, :, 5].view(height, width))
    with pytest.raises(ValueError, match='rows must be "prompt", "negative" or "all", got \'mine\''):
        maps.grid(layer, rows="mine")


def test_without_guidance_all_rows_are_the_prompts(pipe):
    with collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe, [PROMPT, "a dog"], steps=2, guidance_scale=1.0)
    assert maps.mean().shape[0] == 2
    assert torch.equal(maps.mean(), maps.mean(rows="all"))
    with pytest.raises(ValueError, match="no row is known to belong to a negative prompt"):
        maps.grid(rows="negative")


def test_guidance_that_ends_on_the_way_leaves_the_prompts_rows(pipe):
    def end(pipe, step, _timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe, [PROMPT, "a dog"], steps=4, **options)
    assert set(maps.steps.values()) == {4}
    assert maps.grid().shape[0] == 2
    ones = maps.mean().sum(-1)  # of probabilities
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_a_word_is_the_mean_over_its_tokens(maps):
    grid = maps.grid(maps.layers[0])
    for word, places in {**PLACES, "teddy bear": (9, 10)}.items():
        expected = sum(grid[:, place] for place in places) / len(places)
        torch.testing.assert_close(maps.locate(word, maps.layers[0]), expected)
    with pytest.raises(ValueError, match=r"no word 'dog' in the prompt"):
        maps.locate("dog")


def test_layers_of_several_sizes_are_seen_at_the_size_of_the_largest(maps):
    sizes = {maps.picture_size(maps.mean(layer).shape[1]) for layer in maps.layers}
    assert len(sizes) > 1
    grids = [maps.grid(layer) for layer in maps.layers]
    large = [torch.nn.functional.interpolate(each, max(sizes), mode="bilinear") for each in grids]
    torch.testing.assert_close(maps.grid(), sum(large) / len(large))
    assert maps.locate("cat").shape == (2, *max(sizes))


def test_words_are_accepted_as_tokens(pipe, maps):
    prompts = [PROMPT, "a teddy bear by a cat"]  # where the words have other places
    with collect_maps(pipe, layers=maps.layers[0], tokens=["teddy bear", "cat", 0]) as some:
        assert some.tokens == ("teddy bear", "cat", 0)
        latents(pipe, prompts, steps=2)
    assert some.positions == (2, 3, 9, 10, 6, 0)
    with collect_maps(pipe, layers=maps.layers[0]) as everything:
        latents(pipe, prompts, steps=2)
    assert torch.equal(some.mean(), everything.mean()[..., list(some.positions)])
    expected = everything.grid()
    by_hand = torch.stack([(expected[0, 9] + expected[0, 10]) / 2, (expected[1, 2] + expected[1, 3]) / 2])
    torch.testing.assert_close(some.locate("teddy bear"), by_hand)
    with pytest.raises(ValueError, match=r"the tokens \(7,\) of 'by' were not collected, only \(2, 3, 9, 10, 6, 0\)"):
        some.locate("by")
    with collect_maps(pipe, tokens="cat") as one:
        latents(pipe, PROMPT, steps=2)
    assert one.positions == (2, 6)


def test_words_that_cannot_be_found_are_refused_before_the_first_step(pipe):
    with collect_maps(pipe, tokens=["cat", "dog"]) as maps:
        with pytest.raises(ValueError, match="no word 'dog' in the prompt 'a cat, and"):
            latents(pipe, PROMPT, steps=2)
        embeds = pipe.encode_prompt("a dog", "cpu", 1, True)
        with pytest.raises(ValueError, match="words cannot be chosen here: the pipeline was given no prompt as text"):
            latents(pipe, None, steps=2, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    assert not maps.steps
    with collect_maps(pipe, tokens=[2]) as maps:
        latents(pipe, None, steps=2, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    assert maps.prompts == ()
    with pytest.raises(ValueError, match="the word 'dog' cannot be found: the pipeline got no prompt as text"):
        maps.locate("dog")


@pytest.mark.filterwarnings("ignore:difffast. semantic binding diverged")
def test_marks_of_binding_are_not_words(pipe):
    binding = SemanticBinding("object", bind_step_size=1.0)
    with patched(pipe, "exact", binding=binding), collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe, "a [teddy *bear] and a [cat]", steps=8)
    assert maps.prompts[0].text == "a teddy bear and a cat"
    assert maps.prompts[0].find("bear") == (3,)


def test_it_prints_as_a_summary(pipe, maps):
    text = str(maps)
    assert repr(maps) == text
    lines = text.splitlines()
    assert lines[0] == f"AttentionMaps of {len(maps.layers)} layers, all tokens"
    said = "a 1, cat 2, , 3, and 4, a 5, cat 6, by 7, a 8, teddy 9, bear 10"
    assert lines[1] == f"  {PROMPT!r}, words with their tokens: {said}"
    assert lines[-1] == "  rows: 2 of the prompt, 2 of the negative prompt"
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines[2:-1]) == len(maps.layers)
    assert all(line.endswith(", 2 steps") for line in lines[2:-1])
    assert "tensor(" not in text
    with collect_maps(pipe, layers="mid_block.*", tokens=["cat"]) as empty:
        assert str(empty) == "AttentionMaps of 1 layers, tokens ('cat',); nothing has been collected yet"


def test_it_draws_a_map_for_each_word(maps, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn, titles = [], []
    monkeypatch.setattr(axes.Axes, "imshow", lambda _self, picture, **_: drawn.append(picture))
    monkeypatch.setattr(axes.Axes, "set_title", lambda _self, title, **_: titles.append(title))
    maps.plot(tmp_path / "maps.png")
    assert titles == ["a", "cat", ",", "and", "a", "cat", "by", "a", "teddy", "bear"] * 2
    torch.testing.assert_close(torch.from_numpy(drawn[1]), maps.grid()[0, 2])
    torch.testing.assert_close(torch.from_numpy(drawn[10]), maps.grid()[1, 1])
    monkeypatch.undo()
    maps.plot(tmp_path / "maps.png", maps.layers[0])
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.size[0] > 1000


def test_maps_of_positions_are_drawn_without_words(tmp_path):
    pytest.importorskip("matplotlib")
    maps = AttentionMaps(("layer",), (3, 1))
    maps.add("layer", torch.rand(2, 1, 16, 2), (4, 4))
    maps.plot(tmp_path / "maps.svg")
    assert "<svg" in (tmp_path / "maps.svg").read_text()
    assert maps.grid().shape == (2, 2, 4, 4)


@pytest.mark.slow
def test_the_trained_model_looks_where_its_words_are():
    """Of "a red circle and a blue square" the two nouns' maps differ, and lie where the picture is red and blue."""
    pipe = models.embedded_pipeline()
    with collect_maps(pipe, tokens=["circle", "square"]) as maps:
        picture = pipe("a red circle and a blue square", generator=torch.Generator().manual_seed(0)).images[0]
    colours = torch.from_numpy(np.array(picture.resize((16, 16)))).float()
    for word, channel, other in (("circle", 0, 2), ("square", 2, 0)):
        found = torch.nn.functional.interpolate(maps.locate(word)[None], (16, 16), mode="bilinear")[0, 0]
        is_its = colours[..., channel] > colours[..., other] + 50
        assert found[is_its].mean() > found[~is_its].mean()
