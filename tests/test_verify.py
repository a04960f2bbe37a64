"""`minillava.verify`: it agrees with itself, and it names the stage where a wrong model goes wrong."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import minillava.model
import weights
from minillava.checks import LlavaError
from minillava.model import KVCache
from minillava.verify import Reference, Stage, Tap, compare, first_difference, lines, main, stages, verify

PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"


@pytest.fixture(scope="module")
def reference(small):
    """What transformers makes of a random checkpoint."""
    return Reference(small[0], prompt=PROMPT, new_tokens=12)


@pytest.fixture
def model(small):
    """Our model, loaded anew to be broken."""
    return weights.load_model(small[0])


def test_a_right_model_agrees_in_every_stage(model, reference):
    found = verify(model, reference)
    assert first_difference(found) is None
    names = [stage.name for stage in found]
    assert names[2:-4] == list(stages(model, model.config))  # every tap was seen
    cached = ["greedy tokens", "three turns", "three turns, tokens", "positions after eviction"]
    assert [names[0], *names[-4:]] == ["pixels", *cached]
    assert not found[0].note.startswith("not compared")


def exchange(model, patch):
    mlp = model.language_model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def short_positions(cache, count):
    positions = cache.held.amax(0)[:, None] + torch.arange(count)
    advance(cache, count)
    return positions


advance, apply_rope = KVCache.advance, minillava.model.apply_rope


@pytest.mark.parametrize(
    "break_it, name, cause",
    [(lambda model, patch: patch.setattr(minillava.model, "apply_rope", lambda x, cos, sin: apply_rope(x, cos, -sin)),
      "layer 0 query", "RoPE"),
     (lambda model, patch: patch.setattr(model, "config", replace(model.config, vision_feature_layer=-1)),
      "projector", "vision_feature_layer"),
     (lambda model, patch: patch.setattr(model.multi_modal_projector.linear_2, "bias", None), "projector", "bias"),
     (lambda model, patch: patch.setattr(model.language_model.layers[0].input_layernorm, "eps", 1e-5),  # not 1e-6
      "layer 0 norm", "eps"),
     (exchange, "layer 2 MLP", "exchanged"),
     (lambda model, patch: model.language_model.layers[1].mlp.down_proj.weight.data[0].fill_(torch.nan),
      "layer 1 MLP", "activation"),
     (lambda model, patch: patch.setattr(KVCache, "advance", short_positions),
      "positions after eviction", "shortened cache")],
)  # fmt: skip
def test_the_first_stage_that_a_fault_changes_is_named_with_its_cause(
    model, reference, monkeypatch, break_it, name, cause
):
    break_it(model, monkeypatch)
    taps = stages(model, reference.config)
    found = first_difference(compare(model, taps, reference) if name in taps else verify(model, reference))
    assert found is not None and found[0].name == name and cause in found[1]


def test_a_students_module_is_compared_in_the_stages_that_it_has(model, reference):
    features = model.vision_tower(reference.inputs["pixel_values"], -2)  # with CLS
    layers = model.multi_modal_projector
    student = nn.Sequential(OrderedDict(inner=nn.Sequential(layers.linear_1, nn.GELU(), layers.linear_2)))

    def compared(tap, features, stage="projector"):
        return compare(student, {stage: Tap(tap)}, reference, run=lambda: student(features))

    (stage,) = compared("inner", features[:, 1:])
    assert stage.ok and stage.name == "projector"
    assert not compared("inner.0", features[:, 1:])[0].ok
    (stage,) = compared("inner", features)
    assert not stage.ok and stage.note == "[1, 17, 64], expected [1, 16, 64]"
    with pytest.raises(LlavaError, match="'blocks'; the model has no such module"):
        compared("blocks", features)
    with pytest.raises(LlavaError, match="no stage 'projection'"):
        compared("inner", features, "projection")


def test_the_command_agrees_with_transformers_on_the_embedded_checkpoint(capsys):
    assert main(["--new-tokens", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].endswith("stages agree with transformers.")
    assert max(map(len, shown)) <= 80


def test_the_command_ends_with_1_and_names_the_first_stage_that_is_beyond_the_tolerance(small, capsys):
    assert main(["--model", str(small[0]), "--new-tokens", "2", "--tolerance", "-1", "--json"]) == 1
    *_, sentence = lines([Stage(**entry) for entry in json.loads(capsys.readouterr().out)])
    assert sentence.startswith("The first stage that differs is patch embedding. Look at the kernel's weights")


@pytest.mark.parametrize("said, arguments", [
    ("no folder", ["--model", "/nowhere"]), ("no image", ["--image", "none.png"]),
    ("2 or more", ["--new-tokens", "1"]), ("cannot be used", ["--device", "quantum"]),
    ("<image>", ["--prompt", "no picture"]),
])  # fmt: skip
def test_bad_input_ends_with_2_and_a_sentence(capsys, said, arguments):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out
