"""The main job from the command line: what it prints, its JSON, and how it says no."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import edit_weights, picture
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import demo
import weights
from bench import plan
from minillava import files, terminal
from minillava.compressors import METHODS
from minillava.model import Llava
from minillava.scenes import describe, draw, make_scene
from prefixkv import PrefixKV

SHORT = ("--budget", "50%", "--max-new-tokens", "2")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the demo, in this process."""
    try:
        code = demo.main(list(arguments))
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_demo_without_arguments_gives_four_descriptions_and_a_table_in_80_columns(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ") and line][:4] == [
        "full cache", "PrefixKV, 50% of the cache", "PrefixKV, 20% of the cache", "cover, 20% of the cache",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out  # no colour, no cursor movement
    table = [line.split() for line in lines[-4:]]
    assert [row[:2] for row in table] == [["full", "cache"], ["prefixkv", "50%"], ["prefixkv", "20%"], ["cover", "20%"]]
    assert table[0][-1] == "100%"


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "free_memory", lambda: 10_000)
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "MB, 10 KB are free; try --dtype auto" in err
    code, out, err = run(capsys, "--dtype", "auto", *SHORT)
    assert code == 0 and "Weights in float16: " in err and "read from the file as they are used" in err
    monkeypatch.setattr(terminal, "free_memory", lambda: None)  # where it cannot be known
    assert run(capsys, *SHORT)[0] == 0


@pytest.mark.parametrize("megabytes, own, chosen", [
    (1006, torch.float16, "float16"), (1004, torch.float16, "int8"), (1001, torch.float16, "float16"),
    (1011, torch.float32, "float32"), (1009, torch.float32, "bfloat16"), (1004, torch.float32, "int8"),
    (1004, torch.int8, "int8"), (1, torch.int8, "int8"),
])  # fmt: skip
def test_auto_takes_what_leaves_room_and_says_why(monkeypatch, megabytes, own, chosen):
    sizes = {"float32": 10**7, "float16": 5 * 10**6, "bfloat16": 5 * 10**6, "int8": 3 * 10**6}
    name = terminal.dtype_name(own)
    monkeypatch.setattr("weights.memory_needed", lambda folder, dtype: (sizes[dtype or name], own))
    dtype, line = terminal.fitting_dtype(Path("anywhere"), megabytes * 10**6)
    assert dtype == chosen and line.startswith(f"Weights in {chosen}: ") and "int8 takes 3 MB; " in line


def test_the_free_memory_is_less_than_there_is():
    free = files.free_memory()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_is_slow_shows_how_far_it_is_on_a_terminal_alone_and_leaves_nothing(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SLOW", 0.0)
    _, out, err = run(capsys, *SHORT)
    assert err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, again, err = run(capsys, *SHORT)
    lines = err.split("\r")
    assert len(again.splitlines()) == len(out.splitlines())
    assert max(map(len, lines)) < 80 and "\n" not in err
    assert any(line.startswith("loading: ") for line in lines)
    assert any(line.startswith("reading the prompt: ") and "/8 [" in line for line in lines)
    assert lines[-2].strip() == lines[-1] == ""
    monkeypatch.setattr(terminal, "SLOW", 3600.0)
    with terminal.progress_bar("reading", "layer", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_the_demo_prints_ascii_to_a_terminal_that_knows_nothing_else(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert demo.main([*SHORT]) == 0
    assert b"99999999" in written.getvalue() and written.getvalue().isascii()


def test_scenes_are_drawn_by_their_numbers_and_described_one_after_the_other(capsys):
    code, out, err = run(capsys, "--scene", "7", "--json", "--budget", "50%")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["images"] == ["scene 7"]
    assert found["runs"][0]["text"] == describe(make_scene(random.Random(7)))
    code, out, err = run(capsys, "--scene", "7", "--scene", "8", *SHORT)
    assert (code, err) == (0, "") and out.count("full cache\n") == 2
    assert [line for line in out.splitlines() if line.startswith("==")] == ["== scene 7 ==", "== scene 8 =="]
    assert "==" not in run(capsys, "--scene", "7", *SHORT)[1]


def test_a_saved_scene_is_told_as_it_is(tmp_path, capsys):
    path = tmp_path / "scene.png"
    code, out, _ = run(capsys, "--scene", "7", "--save-scene", str(path), "--max-new-tokens", "1")
    scene = make_scene(random.Random(7))
    assert code == 0 and " ".join(out.split()).startswith(f"scene 7, as it is {describe(scene)} full cache")
    assert Image.open(path).tobytes() == draw(scene, oversample=4)[0].tobytes()


def test_compiling_says_first_what_it_costs_and_needs_a_compiler(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("minillava.fast.compile_steps", asked.append)
    for compiler, code, word in ((sys.executable, 0, "about 2 min later"), ("nothing", 2, "there is no nothing")):
        monkeypatch.setenv("CXX", compiler)
        found = run(capsys, "--compile", "--max-new-tokens", "1")
        assert found[0] == code and word in found[2]
    assert len(asked) == 1


def test_the_embedded_model_says_what_it_knows_before_it_describes_a_picture_of_ones_own(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    picture(64, 48).save(photo)
    _, out, err = run(capsys, "--image", str(photo), *SHORT)
    assert out.startswith("The embedded model knows scenes of coloured shapes") and err == ""
    assert "--model llava-hf/llava-1.5-7b-hf" in out.split("full cache")[0]
    assert max(map(len, out.splitlines())) <= 80
    assert "embedded" not in run(capsys, "--image", str(TINY / "examples" / "scene_2.png"), *SHORT)[1]
    assert json.loads(run(capsys, "--image", str(photo), "--json", *SHORT)[1])  # nothing but the object
    elsewhere = shutil.copytree(TINY, tmp_path / "model")
    assert "embedded" not in run(capsys, "--model", str(elsewhere), "--image", str(photo), *SHORT)[1]


def test_the_help_is_in_groups_with_examples_and_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "--help")
    for group in ("picture and question", "model", "cache", "output", "sampling"):
        assert f"\n{group}:\n" in out
    examples = out.split("examples:\n")[1].splitlines()
    assert len(examples) == 3 and all(line.startswith("  python demo.py --") for line in examples)
    assert max(map(len, out.splitlines())) <= 80
    for line in examples:
        demo.parse(line.split()[2:])


def test_json_is_one_object_with_every_field(capsys):
    code, out, err = run(capsys, "--json", "--budget", "30%", "--budget", "0.1", "--max-new-tokens", "20")
    assert (code, err) == (0, "")
    runs = json.loads(out)["runs"]
    assert [(r["method"], r["budget"]) for r in runs] == [("full", 1.0), ("prefixkv", 0.3), ("prefixkv", 0.1)]
    full = runs[0]
    for r in runs:
        assert set(r) == {
            "method", "budget", "text", "token_ids", "prompt_tokens", "kv_bits", "kept_per_layer", "kv_bytes",
            "kv_bytes_allocated", "kv_bytes_full", "prefill_seconds", "decode_seconds", "tokens_per_second",
        }  # fmt: skip
        layers = len(r["kept_per_layer"])
        assert sum(r["kept_per_layer"]) == round(r["budget"] * layers * r["prompt_tokens"])
        assert len(r["token_ids"]) <= 20
        assert r["kv_bytes"] <= r["kv_bytes_allocated"]
    assert full["kv_bytes"] == full["kv_bytes_full"] == (full["prompt_tokens"] + len(full["token_ids"]) - 1) * 8 * 512


@pytest.mark.parametrize("embedded", [True, False])
def test_json_tokens_are_those_of_transformers(tiny_reference, small, tmp_path, capsys, sweep, embedded):
    """The demo describes every picture by itself; transformers all that have the same question, at once."""
    count = 20 if sweep else 4
    if embedded:
        folder, theirs, longest = TINY, tiny_reference, 64
        pictures = [draw(make_scene(random.Random(f"demo {index}")))[0] for index in range(count)]
        questions = ("Describe the image in detail.", "How many objects are there?")
    else:
        folder, theirs, longest = *small[:2], 24
        pictures = [picture(30 + index, 50 - index, index) for index in range(count)]
        questions = ("What is in the image?", "describe it in detail")
    processor = weights.load_processor(folder)
    for number, question in enumerate(questions):
        some = pictures[number::2]
        inputs = processor([processor.chat([(question, None)], 1)] * len(some), some)
        with torch.no_grad():
            expected = theirs.generate(**inputs, max_new_tokens=longest, do_sample=False)
        for image, wanted in zip(some, expected[:, inputs["input_ids"].shape[1] :].tolist()):
            image.save(tmp_path / "picture.png")
            code, out, _ = run(
                capsys, "--json", "--image", str(tmp_path / "picture.png"), "--prompt", question, "--budget", "1",
                "--max-new-tokens", str(longest), "--model", str(folder),
            )  # fmt: skip
            found = [r["token_ids"] for r in json.loads(out)["runs"]]
            assert code == 0 and found[0] == found[1] == wanted[: len(found[0])]
            assert len(found[0]) == longest or ends(theirs, wanted, len(found[0]))


def ends(theirs, tokens, end):
    """An answer of `end` tokens is whole: it has the end token, and behind it is nothing but padding.

    Where generation_config.json names no end, transformers goes on, and the demo ends at the one of config.json.
    """
    stop, pad = theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id
    if stop is None:
        return tokens[end - 1] == theirs.config.text_config.eos_token_id
    return tokens[end - 1] == stop and not {*tokens[end:]} - {pad}


def test_a_seed_makes_sampling_repeatable(capsys, small):
    arguments = ("--model", str(small[0]), "--json", "--budget", "50%", "--max-new-tokens", "16",
                 "--temperature", "1.5", "--top-k", "50", "--top-p", "0.99")  # fmt: skip
    first, again, other = (
        [r["token_ids"] for r in json.loads(run(capsys, *arguments, "--seed", seed)[1])["runs"]] for seed in "112"
    )
    assert first == again != other


def test_every_method_and_budget_is_combined_and_named(capsys, small):
    model = ("--model", str(small[0]), "--budget", "0.4", "--budget", "0.3", "--max-new-tokens", "3")
    methods = [word for method in METHODS for word in ("--method", method)]
    code, out, _ = run(capsys, *model, *methods, "--json")
    full, *compressed = json.loads(out)["runs"]
    named = [[method, budget] for method in METHODS for budget in (0.4, 0.3)]
    assert code == 0 and [[r["method"], r["budget"]] for r in compressed] == named
    tokens = sum(full["kept_per_layer"])
    assert [sum(r["kept_per_layer"]) for r in compressed] == [round(budget * tokens) for _, budget in named]
    out = run(capsys, *model, *methods[:2])[1]
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["full", "cache"], [methods[1], "40%"], [methods[1], "30%"]
    ]  # fmt: skip


def test_few_bits_are_told_alone_and_with_a_method(capsys):
    for options, title, row in (
        ((), "full cache in 2 bits", "full cache, 2 bits"),
        (("--method", "cover", "--budget", "40%"), "cover, 40% of the cache in 2 bits", "cover 40%, 2 bits"),
    ):
        code, out, err = run(capsys, "--kv-bits", "2", *options, "--max-new-tokens", "2")
        assert code == 0 and not err and title in out.splitlines() and row in out
        assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run(capsys, "--kv-bits", "2", "--json", "--max-new-tokens", "20")
    full, few = json.loads(out)["runs"]
    assert (full["kv_bits"], few["kv_bits"], few["kept_per_layer"]) == (None, 2, full["kept_per_layer"])
    assert few["token_ids"] == full["token_ids"]
    assert few["kv_bytes"] < 0.15 * full["kv_bytes"]  # of 32 bits; some of the newest tokens are in full


def test_several_images_in_one_prompt(capsys):
    pictures = [str(path) for path in sorted((TINY / "examples").glob("*.png"))[:2]]
    code, out, _ = run(capsys, "--json", "--image", pictures[0], "--image", pictures[1], *SHORT)
    assert code == 0 and json.loads(out)["runs"][0]["prompt_tokens"] > 2 * 576


QUESTIONS = ["How many objects are there?", "Is there a red square?", "Where is the star?"]


@pytest.fixture
def talk(capsys, monkeypatch):
    """A chat of these questions: its output without prompts, its stderr, and the length of every block it read."""
    blocks, read = [], Llava.read

    def noted(self, input_ids, *others, **named):
        blocks.append(input_ids.shape[1])
        return read(self, input_ids, *others, **named)

    monkeypatch.setattr(Llava, "read", noted)

    def chat(questions, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*questions, "", ""])))
        code, out, err = run(capsys, "--chat", *options)
        assert code == 0
        return [line.strip() for line in out.replace("you: ", "").splitlines()[1:]], err, [n for n in blocks if n > 1]

    return chat


@pytest.mark.parametrize("options", [(), ("--method", "cover", "--budget", "50%")])
def test_a_turn_reads_only_what_is_new_and_is_answered_as_if_all_were_read_again(talk, tiny, options):
    model, processor = tiny
    lines, err, blocks = talk(QUESTIONS, *options)
    assert err == "" and blocks[0] > 500 and max(blocks[1:]) < 20 and len(blocks) == 3
    answers, costs = lines[::2], lines[1::2]
    assert all("tokens held; first word after" in line for line in costs)
    image, turns = Image.open(PICTURE), []
    for question, answer in zip(QUESTIONS, answers):
        prompt = processor.chat([*turns, (question, None)], 1)
        made = model.generate(**processor(prompt, [image])).token_ids[0]
        assert processor.decode(made).strip() == answer  # cover keeps enough for these three
        turns.append((question, answer))


def test_where_a_template_rewrites_history_the_conversation_is_read_again_and_that_is_told(talk, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    last = (
        "{% set m = messages[-1] %}USER: <image>\n{{ m['content'][-1]['text'] }} ({{ messages | length }}) ASSISTANT:"
    )
    (folder / "chat_template.jinja").write_text(last)
    lines, err, blocks = talk(QUESTIONS[:1] * 2, "--model", str(folder))
    assert err == "" or "leaves out" in err
    assert sum("read again" in line for line in lines) == 1 and min(blocks) > 500


@pytest.mark.parametrize("options", [(), ("--method", "h2o"), ("--budget", "30%")])
def test_a_conversation_goes_on_until_the_model_has_no_positions_left(talk, small, options):
    lines, err, blocks = talk(["a cat."] * 40, "--model", str(small[0]), "--max-new-tokens", "30", *options)
    assert err == "" and lines[-1] == "The conversation has filled the model's 256 positions; start another one."
    assert sum(blocks) <= 256 or any("read again" in line for line in lines)


def test_ctrl_c_ends_an_answer_and_the_next_question_goes_on(talk, monkeypatch):
    shown, wrapped = [], terminal.wrapped

    def interrupted(text):
        if not shown:
            shown.append(signal.raise_signal(signal.SIGINT))
        return wrapped(text)

    monkeypatch.setattr(terminal, "wrapped", interrupted)
    before = signal.getsignal(signal.SIGINT)
    lines, err, blocks = talk(["Describe the image in detail.", QUESTIONS[1]])
    assert err == "" and lines[0] == "The" and lines[2] == "yes."
    assert len(blocks) == 2 and blocks[1] < 30 and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_a_question_is_read_drops_it_and_the_chat_goes_on(talk, monkeypatch):
    pressed, update = [], terminal.tqdm.update

    def interrupted(self, *arguments):
        if self.total == 8 and not pressed:  # layers
            pressed.append(signal.raise_signal(signal.SIGINT))
        update(self, *arguments)

    monkeypatch.setattr(terminal.tqdm, "update", interrupted)
    lines, err, _ = talk(QUESTIONS[:2])
    assert err == "The question is dropped.\n" and lines[0] == "yes."


def test_a_question_that_cannot_be_used_is_dropped_and_the_cache_stays(talk):
    lines, err, blocks = talk([QUESTIONS[0], "What is <image>?", QUESTIONS[1]])
    assert "2 <image> and 1 images were given" in err and len(blocks) == 2 and lines[2] == "yes."


def fake_run(layers: int) -> demo.Run:
    return demo.Run(
        "prefixkv", 0.2, "a b", [1], 99999, None, [20000] * layers, 10**10, 10**11, 10**11, 1.0, 1.0, 12345.0
    )


@pytest.mark.parametrize("layers", [1, 8, 12, 13, 40, 70])
def test_the_table_fits_80_columns_and_shows_every_layer(layers):
    text = demo.table([fake_run(layers), fake_run(layers)])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("▂") == 2 * layers


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids):
        return "".join(self.text[i] for i in ids)


@given(st.text(alphabet="ab \n\x1b\x07-", max_size=400))
def test_text_typed_letter_by_letter_is_all_there_wrapped_and_harmless(text):
    """Text that would move the cursor, too."""
    with pytest.MonkeyPatch.context() as patch:
        stdout = io.StringIO()
        patch.setattr(sys, "stdout", stdout)
        ids, _ = terminal.write(Letters(text), map(torch.tensor, range(len(text))))
    out = stdout.getvalue()
    assert ids == list(range(len(text)))
    assert out.split() == text.replace("\x1b", "\ufffd").replace("\x07", "\ufffd").split()
    assert all(len(line) < 80 or " " not in line.strip() for line in out.splitlines())
    assert out.endswith("\n") == bool(text.strip())


def test_an_answer_is_shown_word_by_word(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    seen = []

    def tokens():
        for index in range(len("one two. three")):
            seen.append(sys.stdout.getvalue())
            yield torch.tensor(index)

    terminal.write(Letters("one two. three"), tokens())
    assert list(dict.fromkeys(seen)) == ["", "  one", "  one two."]
    assert sys.stdout.getvalue() == "  one two. three\n"


PICTURE = str(TINY / "examples" / "scene_1.png")


@pytest.mark.parametrize(
    "arguments, word",
    [(["--budget", "0"], "budget"), (["--budget", "1.5"], "budget"), (["--budget", "nan"], "budget"),
     (["--budget", "much"], "budget"), (["--max-new-tokens", "0"], "max-new-tokens"),
     (["--max-new-tokens", "many"], "max-new-tokens"), (["--max-new-tokens", "100000"], "positions"),
     (["--temperature", "-1"], "temperature"), (["--temperature", "nan"], "temperature"), (["--top-p", "0"], "top-p"),
     (["--seed", str(2**70)], "--seed"), (["--seed", "-1"], "--seed"), (["--scene", "-1"], "--scene"),
     (["--scene", str(2**63)], "--scene"), (["--scene", "7", "--image", "a.png"], "--scene"),
     (["--save-scene", "a.png"], "give one --scene"), (["--scene", "1", "--scene", "2", "--json"], "--scene"),
     (["--scene", "1", "--scene", "2", "--chat"], "--scene"),
     (["--image", "missing.png"], "no image at missing.png"),
     (["--image", "README.md"], "is not an image that can be read"),
     (["--model", "tests"], "no config.json"), (["--model", "nowhere at all"], "no folder"),
     (["--model", "someone/unknown-model"], "Check the id and the network"),
     (["--prompt", "<image> <image>", "--image", PICTURE], "2 <image> and 1 images"),
     (["--prompt", "red circle " * 2000], "positions"), (["--prompt", "What is \udcff?"], "as UTF-8 text"),
     (["--device", "quantum"], "device"), (["--device", "meta"], "device"), (["--device", "hpu"], "device"),
     (["--device", "privateuseone"], "device"), (["--chat", "--json"], "--json"),
     (["--chat", "--prompt", "Why?"], "--prompt"), (["--chat", "--budget", "0.2", "--budget", "0.5"], "one --budget"),
     (["--chat", "--method", "h2o", "--method", "local"], "one --method"), (["--method", "nothing"], "invalid choice"),
     (["--method", "h2o", "--plan", "plan.json"], "--method"), (["--kv-bits", "5"], "2, 3, 4, 8"),
     (["--plan", "missing.json"], "missing.json holds no plan"), (["--plan", "README.md"], "README.md holds no plan")],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_exit_code_2(capsys, monkeypatch, arguments, word):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert word in err
    assert "Traceback" not in err and len(err.strip().splitlines()[-1]) > 20


def test_not_a_number_in_the_weights_is_refused_with_the_layer(small, tmp_path, capsys):
    folder = shutil.copytree(small[0], tmp_path / "broken")
    query = "language_model.model.layers.3.self_attn.q_proj.weight"
    edit_weights(folder, lambda state: state[query][0].fill_(float("nan")))
    code, _, err = run(capsys, "--model", str(folder), "--prompt", "yes")
    assert code == 2 and "NaN or infinity" in err
    with pytest.raises(ValueError, match="layer 3"):
        model, processor = weights.load(folder)
        model.generate(**processor("yes"), compressor=PrefixKV(0.5))


def test_a_saved_plan_compresses_alike_layer_by_layer(tmp_path, capsys):
    path = str(tmp_path / "plan.json")
    assert plan.main(["--budget", "0.3", "--save", path]) == 0
    searched, planned = (
        json.loads(run(capsys, "--json", "--max-new-tokens", "12", *options)[1])["runs"][1]
        for options in (("--budget", "0.3"), ("--plan", path))
    )
    for field in ("kept_per_layer", "token_ids", "budget"):
        assert planned[field] == searched[field]


def test_a_plan_for_a_model_of_other_layers_is_refused(tmp_path, capsys):
    (tmp_path / "plan.json").write_text("[0.5, 0.5]")
    code, _, err = run(capsys, "--plan", str(tmp_path / "plan.json"))
    assert code == 2 and "2 layers" in err
