"""`minillava.verify`: it agrees with itself, and it names the stage where a wrong model goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import minillava.model
import weights
from minillava.checks import LlavaError
from minillava.model import Llava
from minillava.verify import Reference, Stage, Tap, compare, first_difference, main, stages, verify

PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"


@pytest.fixture(scope="module")
def checkpoint(small):
    """A random checkpoint with grouped-query attention, and what transformers makes of it."""
    return small[0], Reference(small[0], prompt=PROMPT, new_tokens=40)


@pytest.fixture
def model(checkpoint):
    """Our model, loaded anew to be broken."""
    return weights.load_model(checkpoint[0])


def test_a_right_model_agrees_in_every_stage(model, checkpoint):
    found = verify(model, checkpoint[1])
    assert first_difference(found) is None
    names = [stage.name for stage in found]
    assert names[2:-4] == list(stages(model, model.config))  # every tap was seen
    cached = ["greedy tokens", "three turns", "three turns, tokens", "positions after eviction"]
    assert [names[0], *names[-4:]] == ["pixels", *cached]
    assert not any(stage.note.startswith("not compared") for stage in found if stage.name == "pixels")


def neighbours(model, patch):
    def rope(x, cos, sin):
        even, odd = x[..., 0::2], x[..., 1::2]
        half = x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., half:]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    patch.setattr(minillava.model, "apply_rope", rope)


def other_features(model, patch):
    model.config = replace(model.config, vision_feature_layer=-1)


def no_bias(model, patch):
    model.multi_modal_projector.linear_2.bias = None


def other_eps(model, patch):
    for layer in model.language_model.layers:
        layer.input_layernorm.eps = 1e-5  # the checkpoint's is 1e-6


def exchanged(model, patch):
    mlp = model.language_model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def short_positions(model, patch):
    class Unshifted(Llava):
        def read(self, input_ids, cache, *images, **named):
            rope = self.language_model.cos_sin
            if cache.key:
                wrong = rope(cache.held.amax(0)[:, None] + torch.arange(input_ids.shape[1]))
                self.language_model.cos_sin = lambda positions: wrong
            try:
                return super().read(input_ids, cache, *images, **named)
            finally:
                self.language_model.cos_sin = rope

    model.__class__ = Unshifted


@pytest.mark.parametrize(
    "fault, name, cause",
    [(neighbours, "layer 0 query", "RoPE"), (other_features, "projector", "vision_feature_layer"),
     (no_bias, "projector", "bias"), (other_eps, "layer 0 norm", "eps"), (exchanged, "layer 2 MLP", "exchanged"),
     (short_positions, "positions after eviction", "shortened cache")],
)  # fmt: skip
def test_the_first_stage_that_a_fault_changes_is_named_with_its_cause(
    model, checkpoint, monkeypatch, fault, name, cause
):
    fault(model, monkeypatch)
    found = first_difference(verify(model, checkpoint[1]))
    assert found is not None and found[0].name == name and cause in found[1]


class Student(nn.Module):
    """The projector alone, with names of its own."""

    def __init__(self, source):
        super().__init__()
        self.inner = nn.Sequential(source.linear_1, nn.GELU(), source.linear_2)

    def forward(self, features):
        return self.inner(features)


def test_a_students_module_is_compared_in_the_stages_that_it_has(model, checkpoint):
    reference = checkpoint[1]
    features = model.vision_tower(reference.inputs["pixel_values"], -2)  # with CLS
    student = Student(model.multi_modal_projector)

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


def test_nan_is_a_difference(model, checkpoint):
    model.language_model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    found = compare(model, stages(model, model.config), checkpoint[1])
    assert next(stage for stage in found if not stage.ok).name == "layer 1 MLP"


def test_the_command_agrees_with_transformers_on_the_embedded_checkpoint(capsys):
    assert main(["--new-tokens", "4"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].endswith("stages agree with transformers.")
    assert max(map(len, shown)) <= 80


def test_the_command_ends_with_1_and_the_stage_for_a_model_that_differs(small, capsys, monkeypatch):
    load, short = weights.load_model, ["--model", str(small[0]), "--new-tokens", "2"]

    def broken(*arguments):
        model = load(*arguments)
        model.language_model.norm.weight.data *= 1.01
        return model

    monkeypatch.setattr(weights, "load_model", broken)
    assert main(short) == 1
    assert "The first stage that differs is final norm." in capsys.readouterr().out
    assert main([*short, "--json"]) == 1
    found = [Stage(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert [stage.name for stage in found if not stage.ok][:1] == ["final norm"]


@pytest.mark.parametrize("said, arguments", [
    ("no folder", ["--model", "/nowhere"]), ("no image", ["--image", "none.png"]),
    ("2 or more", ["--new-tokens", "1"]), ("cannot be used", ["--device", "quantum"]),
    ("<image>", ["--prompt", "no picture"]),
])  # fmt: skip
def test_bad_input_ends_with_2_and_a_sentence(capsys, said, arguments):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out
