"""Prompts: read, embedded once, kept, and let go of their encoders."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill import prompts
from fewstep.distill.draws import Draws
from fewstep.distill.prompts import PromptsRecipe, embed, fingerprint, prompted, read_prompts
from fewstep.models import load

TEXTS = ["a fox", "two hares", "a b c"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.csv", "x", "must end in .txt or .jsonl"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2 of .*a.jsonl is not JSON"),
        (
            "a.jsonl",
            '{"words": "x"}\n',
            "line 1 of .* must be an object with a text under prompt, caption, text",
        ),
        ("a.jsonl", '"x"\n', "line 1 of .* must be an object"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def of(name, pipelines):
    pipe = pipelines.build(name)
    if name in pipelines.FLOWS:
        return load(pipe, height=16, width=16), {"max_sequence_length": 16}
    return load(pipe, height=16, width=16), {}


@pytest.mark.parametrize("name", ["sdxl", "flux"])  # nested keywords and a null; shared ones and a scale
def test_rows_are_what_the_pipeline_says_of_each_prompt(name, pipelines, tmp_path):
    d, options = of(name, pipelines)
    told = {"guidance_scale": 2.0} if d.codec.distilled else {}
    wanted = [d.codec.embed(text, "" if told else "blurry", **options, **told) for text in TEXTS]
    recipe = PromptsRecipe(
        cache=str(tmp_path),
        options=options,
        batch=2,
        negative="" if told else "blurry",
        scale=2.0 if told else None,
    )
    found = embed(d, TEXTS, recipe)
    assert all(
        getattr(d.codec.pipe, n, None) is None for n in ("text_encoder", "text_encoder_2", "text_encoder_3")
    )
    x, t = torch.randn(3, *d.shape), float(d.path.t_max) / 2
    rows = found.rows(torch.tensor([2, 0, 2]))
    alone = torch.cat([d(x[k : k + 1], t, **wanted[which].cond) for k, which in enumerate((2, 0, 2))])
    torch.testing.assert_close(d(x, t, **rows), alone, rtol=1e-4, atol=1e-5)
    if told:
        assert found.null() is None and rows["guidance"].tolist() == [2.0] * 3
    else:
        empty = d(x[:1], t, **{**wanted[0].cond, **wanted[0].null})
        torch.testing.assert_close(d(x[:1], t, **found.null()), empty, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(empty, d(x[:1], t, **wanted[0].cond), atol=1e-3)


def test_they_are_embedded_once_and_a_broken_off_cache_goes_on(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SHARD", 4)
    texts = [f"a {'b' * k}" for k in range(7)]
    recipe, asked = PromptsRecipe(cache=str(tmp_path), batch=3), []

    def counted():
        d, _ = of("sd", pipelines)
        own = d.codec.embed
        monkeypatch.setattr(d.codec, "embed", lambda *a, **k: asked.append(len(a[0])) or own(*a, **k))
        return d

    first = embed(counted(), texts, recipe)
    assert asked == [3, 1, 3]
    whole = first.rows(torch.tensor([0, 5]))["encoder_hidden_states"]
    again = embed(counted(), texts, recipe)
    assert len(asked) == 3 and again.folder == first.folder
    (first.folder / "about.json").unlink()  # it was broken off in the last part
    (first.folder / "000001.safetensors").unlink()
    asked.clear()
    again = embed(counted(), texts, recipe)
    assert asked == [3, 1, 3]  # the first part again: it says what the others look like
    assert torch.equal(again.rows(torch.tensor([0, 5]))["encoder_hidden_states"], whole)
    other = embed(counted(), texts[:2], recipe)
    assert other.folder != first.folder


def test_another_encoder_is_another_cache(pipelines):
    d, _ = of("sd", pipelines)
    before = fingerprint(d.codec.pipe)
    assert fingerprint(of("sd", pipelines)[0].codec.pipe) == before
    with torch.no_grad():
        d.codec.pipe.text_encoder.get_input_embeddings().weight[0, 0] += 1
    assert fingerprint(d.codec.pipe) != before


def test_batches_follow_from_their_draws_and_labels_are_prompts_numbers(pipelines, tmp_path):
    from fewstep.distill.data.source import Items, of_items

    d, _ = of("sd", pipelines)
    embedded = embed(d, TEXTS, PromptsRecipe(cache=str(tmp_path)))
    data = prompted(d, embedded)
    whole, half = data.batch(Draws(0, 3, 0, 4, 4)), data.batch(Draws(0, 3, 2, 2, 4))
    key = "encoder_hidden_states"
    assert whole.real is None and torch.equal(whole.cond[key][2:], half.cond[key])
    latents = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, *d.shape)
    pairs = prompted(
        d, embedded, of_items(Items("three", 3, d.shape, lambda rows: latents[rows], torch.arange(3)))
    )
    batch = pairs.batch(Draws(0, 3, 0, 8, 8))
    which = batch.real[:, 0, 0, 0].long()
    assert len(set(which.tolist())) > 1 and torch.equal(batch.cond[key], embedded.rows(which)[key])
    far = of_items(Items("far", 3, d.shape, lambda rows: latents[rows], torch.arange(3) + 1))
    with pytest.raises(
        ValueError, match="labels up to 3, which are its prompts' numbers, and there are 3 prompts"
    ):
        prompted(d, embedded, far)
    small = of_items(Items("small", 3, (4, 4, 4), lambda rows: latents[rows]))
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\), and the teacher makes \(4, 8, 8\)"):
        prompted(d, embedded, small)
    flux, _ = of("flux", pipelines)
    shape = (4, 8, 8)  # unpacked
    packed = prompted(
        flux, embedded, of_items(Items("flat", 3, shape, lambda rows: torch.randn(len(rows), *shape)))
    )
    assert packed.batch(Draws(0, 3, 0, 2, 2)).real.shape[1:] == flux.shape
