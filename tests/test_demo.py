"""The main job from the command line: what it prints, its JSON, and how it says no."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import edit_weights, picture
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import demo
from bench import plan
from coursework.second import answers
from minillava import files, terminal
from minillava.compressors import METHODS
from minillava.model import Llava
from minillava.scenes import describe, draw, make_scene

SHORT = ("--budget", "50%", "--max-new-tokens", "2")
PICTURE, OTHER = (str(TINY / "examples" / f"scene_{number}.png") for number in (1, 2))


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the demo in this process: exit code, stdout, stderr. With --chat and nothing typed, it only loads."""

    def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        try:
            code = demo.main(list(arguments))
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return run


def told(run, *arguments: str) -> dict:
    """The object that the demo, which must succeed, prints as JSON."""
    code, out, err = run("--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def little(small):
    """Options for a random model with a short prompt, which answers sooner than the embedded one."""
    return "--model", str(small[0])


@pytest.mark.parametrize("arguments, titles, rows", [
    ((), ["full cache", "PrefixKV, 50% of the cache", "PrefixKV, 20% of the cache", "cover, 20% of the cache"],
     ["full cache", "prefixkv 50%", "prefixkv 20%", "cover 20%"]),
    (("--kv-bits", "2"), ["full cache", "full cache in 2 bits"], ["full cache", "full cache, 2 bits"]),
    (("--kv-bits", "2", "--method", "cover", "--budget", "40%"), ["full cache", "cover, 40% of the cache in 2 bits"],
     ["full cache", "cover 40%, 2 bits"]),
])  # fmt: skip
def test_every_way_is_answered_under_its_title_and_has_its_row_in_80_columns(run, little, arguments, titles, rows):
    code, out, err = run(*(arguments or little), *SHORT[2:])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    shown = [line for line in lines if line and line[0] != " "]
    table = shown[len(titles) :][: len(rows)]
    assert shown[: len(titles)] == titles
    assert [re.split(" {2,}", line)[0] for line in table] == rows and table[0].endswith("100%")
    assert max(map(len, lines)) <= 80 and "\x1b" not in out  # no colour, no cursor movement


@pytest.mark.parametrize("layers", [1, 8, 12, 13, 40, 70])
def test_the_table_fits_80_columns_and_shows_every_layer(layers):
    kept = [20000] * layers
    run = demo.Run("prefixkv", 0.2, "a b", [1], 99999, None, kept, 10**10, 10**11, 10**11, 1.0, 1.0, 12345.0)
    text = demo.table([run, run])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("▂") == 2 * layers


def test_the_demo_prints_ascii_to_a_terminal_that_knows_nothing_else(little, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert demo.main([*little, *SHORT]) == 0
    assert b" 9999 " in written.getvalue() and written.getvalue().isascii()


def test_the_help_is_in_groups_with_examples_and_fits_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("--help")
    for group in ("picture and question", "model", "cache", "output", "sampling"):
        assert f"\n{group}:\n" in out
    examples = out.split("examples:\n")[1].splitlines()
    assert len(examples) == 3 and all(line.startswith("  python demo.py --") for line in examples)
    assert max(map(len, out.splitlines())) <= 80
    for line in examples:
        demo.parse(line.split()[2:])


def test_what_is_slow_shows_how_far_it_is_on_a_terminal_alone_and_leaves_nothing(run, little, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SLOW", 0.0)
    _, out, err = run(*little, *SHORT)
    assert err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, again, err = run(*little, *SHORT)
    lines = err.split("\r")
    assert len(again.splitlines()) == len(out.splitlines())
    assert max(map(len, lines)) < 80 and "\n" not in err
    assert any(line.startswith("loading: ") for line in lines)
    assert any(line.startswith("reading the prompt: ") and "/4 [" in line for line in lines)
    assert lines[-2].strip() == lines[-1] == ""
    monkeypatch.setattr(terminal, "SLOW", 3600.0)
    with terminal.progress_bar("reading", "layer", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


@given(st.text(alphabet="ab \n\x1b\x07-", max_size=200))
def test_text_typed_letter_by_letter_is_shown_word_by_word_wrapped_and_harmless(text):
    """Text that would move the cursor, too."""
    harmless, stdout = text.replace("\x1b", "\ufffd").replace("\x07", "\ufffd"), io.StringIO()

    def tokens():
        for index in range(len(text)):
            whole = 1 + max(harmless.rfind(blank, 0, index) for blank in " \n")  # a word waits for its end
            assert stdout.getvalue().split() == harmless[:whole].split()
            yield torch.tensor(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        letters = SimpleNamespace(decode=lambda ids: "".join(text[i] for i in ids))  # a tokenizer
        ids, _ = terminal.write(letters, tokens())
    out = stdout.getvalue()
    assert ids == list(range(len(text))) and out.split() == harmless.split()
    assert all(line.startswith("  ") for line in out.splitlines() if line)
    assert all(len(line) < 80 or " " not in line.strip() for line in out.splitlines())
    assert out.endswith("\n") == bool(text.strip())


def test_scenes_are_described_one_after_the_other_and_a_saved_one_is_told_as_it_is(run, little, tmp_path):
    code, out, err = run("--scene", "7", "--scene", "8", *little, *SHORT)
    assert (code, err) == (0, "") and out.count("full cache\n") == 2
    assert [line for line in out.splitlines() if line.startswith("==")] == ["== scene 7 ==", "== scene 8 =="]
    path, scene = str(tmp_path / "scene.png"), make_scene(random.Random(7))
    code, out, _ = run("--scene", "7", "--save-scene", path, *little, *SHORT)
    assert code == 0 and " ".join(out.split()).startswith(f"scene 7, as it is {describe(scene)} full cache")
    assert Image.open(path).tobytes() == draw(scene, oversample=4)[0].tobytes() and "==" not in out
    short = ("--budget", "50%", "--max-new-tokens", "12")
    drawn, saved = (told(run, *which, *short) for which in (("--scene", "7"), ("--image", path)))
    assert drawn["images"] == ["scene 7"] and drawn["runs"][0]["text"] == saved["runs"][0]["text"]


def test_the_embedded_model_says_what_it_knows_before_it_describes_a_picture_of_ones_own(run, tmp_path):
    photo = tmp_path / "photo.png"
    picture(64, 48).save(photo)
    _, out, err = run("--chat", "--image", str(photo))
    assert out.startswith("The embedded model knows scenes of coloured shapes") and err == ""
    assert "--model llava-hf/llava-1.5-7b-hf" in out.split("Ask about")[0]
    assert max(map(len, out.splitlines())) <= 80
    assert told(run, "--image", str(photo), *SHORT)  # nothing but the object
    elsewhere = str(shutil.copytree(TINY, tmp_path / "model"))
    for known in (("--image", OTHER), ("--model", elsewhere, "--image", str(photo))):
        assert "embedded" not in run("--chat", *known)[1]


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(run, monkeypatch):
    monkeypatch.setattr(terminal, "free_memory", lambda: 10_000)
    code, out, err = run()
    assert (code, out) == (2, "") and "MB, 10 KB are free; try --dtype auto" in err
    code, out, err = run("--chat", "--dtype", "auto")
    assert code == 0 and "Weights in float16: " in err and "read from the file as they are used" in err
    monkeypatch.setattr(terminal, "free_memory", lambda: None)  # where it cannot be known
    assert run("--chat", "--dtype", "auto")[0] == 0
    free = files.free_memory()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def test_compiling_says_first_what_it_costs_and_needs_a_compiler(run, monkeypatch):
    asked = []
    monkeypatch.setattr("minillava.fast.compile_steps", asked.append)
    for compiler, code, word in ((sys.executable, 0, "about 2 min later"), ("nothing", 2, "there is no nothing")):
        monkeypatch.setenv("CXX", compiler)
        found = run("--chat", "--compile")
        assert found[0] == code and word in found[2]
    assert len(asked) == 1


def test_json_is_one_object_with_every_field_of_every_method_and_budget(run, little, small):
    methods, text = [word for method in METHODS for word in ("--method", method)], small[2].config.text
    options = ("--budget", "40%", "--budget", "0.3", "--max-new-tokens", "3", "--image", PICTURE, "--image", OTHER)
    found = told(run, *little, *methods, *options)
    assert found["images"] == [PICTURE, OTHER] and found["prompt"].count("<image>") == 2
    runs = found["runs"]
    assert [(r["method"], r["budget"]) for r in runs] == [("full", 1.0), *itertools.product(METHODS, (0.4, 0.3))]
    for r in runs:
        assert list(r) == [
            "method", "budget", "text", "token_ids", "prompt_tokens", "kv_bits", "kept_per_layer", "kv_bytes",
            "kv_bytes_allocated", "kv_bytes_full", "prefill_seconds", "decode_seconds", "tokens_per_second",
        ]  # fmt: skip
        assert sum(r["kept_per_layer"]) == round(r["budget"] * text.num_hidden_layers * r["prompt_tokens"])
        assert len(r["token_ids"]) <= 3
        if r["method"] in ("full", "prefixkv"):  # others note something of each token
            assert r["kv_bytes"] <= r["kv_bytes_allocated"]
    full, token = runs[0], 4 * 2 * text.kv_heads * text.head_size * text.num_hidden_layers
    assert full["kv_bytes"] == full["kv_bytes_full"] == (full["prompt_tokens"] + len(full["token_ids"]) - 1) * token


def test_json_tokens_are_those_of_transformers(run, tiny, tiny_reference, tmp_path, sweep, new_tokens):
    """The demo describes every picture by itself; transformers all that have the same question, at once."""
    processor, end, path = tiny[1], tiny_reference.config.text_config.eos_token_id, str(tmp_path / "picture.png")
    for question in ("Describe the image in detail.", "How many objects are there?"):
        pictures = [draw(make_scene(random.Random(f"{question} {index}")))[0] for index in range(10 if sweep else 1)]
        inputs = processor([processor.chat([(question, None)], 1)] * len(pictures), pictures)
        with torch.no_grad():
            expected = tiny_reference.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        for image, wanted in zip(pictures, expected[:, inputs["input_ids"].shape[1] :].tolist()):
            image.save(path)
            options = ("--image", path, "--prompt", question, "--budget", "1", "--max-new-tokens", str(new_tokens))
            whole = wanted[: [*wanted, end].index(end) + 1]  # behind the end is padding
            assert [r["token_ids"] for r in told(run, *options)["runs"]] == [whole, whole]


def test_a_seed_makes_sampling_repeatable(run, little):
    options = ("--budget", "50%", "--max-new-tokens", "8", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.99")
    found = [told(run, *little, *options, "--seed", seed)["runs"] for seed in "112"]
    first, again, other = ([r["token_ids"] for r in runs] for runs in found)
    assert first == again != other


def test_few_bits_keep_every_token_in_few_bytes(run):
    full, few = told(run, "--kv-bits", "2", "--max-new-tokens", "2")["runs"]
    assert (full["kv_bits"], few["kv_bits"], few["kept_per_layer"]) == (None, 2, full["kept_per_layer"])
    assert few["kv_bytes"] < 0.15 * few["kv_bytes_full"]  # of 32 bits; some of the newest tokens are in full


def test_a_saved_plan_compresses_alike_layer_by_layer(run, little, tmp_path):
    path = str(tmp_path / "plan.json")
    assert plan.main(["--budget", "0.3", "--save", path, *little]) == 0
    which = (("--budget", "0.3"), ("--plan", path))
    searched, planned = (told(run, *little, "--max-new-tokens", "12", *options)["runs"][1] for options in which)
    assert all(planned[field] == searched[field] for field in ("kept_per_layer", "token_ids", "budget"))


QUESTIONS = ["How many objects are there?", "Is there a red square?", "Where is the star?"]


@pytest.fixture
def talk(run, monkeypatch):
    """A chat of these questions: its output without prompts, its stderr, and the length of every block it read.

    `chat.ids` are all tokens that it read, in their order.
    """
    read = Llava.read

    def chat(questions, *options):
        blocks, chat.ids = [], []

        def noted(self, input_ids, *others, **named):
            blocks.append(input_ids.shape[1])
            chat.ids += input_ids[0].tolist()
            return read(self, input_ids, *others, **named)

        monkeypatch.setattr(Llava, "read", noted)
        code, out, err = run("--chat", *options, typed="\n".join([*questions, "", ""]))
        assert code == 0
        return [line.strip() for line in out.replace("you: ", "").splitlines()[1:]], err, [n for n in blocks if n > 1]

    return chat


@pytest.mark.parametrize(
    "options, method",
    [
        ((), None),
        (("--method", "cover", "--budget", "50%"), METHODS["cover"](0.5)),
    ],
)
def test_a_turn_reads_only_what_is_new_and_goes_on_with_the_same_cache(talk, tiny, options, method):
    lines, err, blocks = talk(QUESTIONS, *options)
    assert err == "" and blocks[0] > 500 and max(blocks[1:]) < 20 and len(blocks) == len(QUESTIONS)
    assert lines[0:4:2] == answers(*tiny, Image.open(PICTURE), QUESTIONS[:2], method)
    turns = [*zip(QUESTIONS[:2], lines[::2]), (QUESTIONS[2], None)]
    prompt = tiny[1](tiny[1].chat(turns, 1), [Image.open(PICTURE)])["input_ids"][0].tolist()
    assert talk.ids[: len(prompt)] == prompt
    for line in lines[1::2]:
        held, total = re.match(r"([\d,]+) of ([\d,]+) tokens held; first word after ", line).groups()
        assert int(held.replace(",", "")) / int(total.replace(",", "")) == pytest.approx(0.5 if method else 1, abs=0.01)


def test_where_a_template_rewrites_history_the_conversation_is_read_again_and_that_is_told(talk, small, tmp_path):
    folder = shutil.copytree(small[0], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% set m = messages[-1] %}USER: <image>\n{{ m['content'][-1]['text'] }} ({{ messages | length }}) ASSISTANT:"
    )
    lines, err, blocks = talk(QUESTIONS[:1] * 2, "--model", str(folder), "--max-new-tokens", "4")
    assert err == "" or "leaves out" in err
    assert sum("read again" in line for line in lines) == 1 and len(blocks) == 2 and min(blocks) > 16


@pytest.mark.parametrize("options", [(), ("--method", "h2o"), ("--budget", "30%")])
def test_a_conversation_goes_on_until_the_model_has_no_positions_left(talk, little, options):
    lines, err, blocks = talk(["a cat. " * 6] * 40, *little, "--max-new-tokens", "8", *options)
    assert err == "" and lines[-1] == "The conversation has filled the model's 256 positions; start another one."
    assert sum(blocks) <= 256 or any("read again" in line for line in lines)


def test_a_first_prompt_is_answered_if_a_position_is_left(small, monkeypatch):
    *_, model, processor = small
    length = processor(processor.chat([("a cat.", None)], 0))["input_ids"].shape[1]
    for left in (0, 1):
        text = replace(model.config.text, max_position_embeddings=length + left)
        monkeypatch.setattr(model, "config", replace(model.config, text=text))
        talk = terminal.Conversation(model, processor, [], model.new_cache, max_new_tokens=4)
        assert (talk.read("a cat.") is None) == (left == 0)


def press_ctrl_c(monkeypatch, owner, name, when=lambda *arguments: True):
    """Ctrl-C comes with the first call of a function of which `when` holds."""
    original, pressed = getattr(owner, name), []

    def interrupted(*arguments):
        if not pressed and when(*arguments):
            pressed.append(signal.raise_signal(signal.SIGINT))
        return original(*arguments)

    monkeypatch.setattr(owner, name, interrupted)


def test_ctrl_c_ends_an_answer_and_the_next_question_goes_on(talk, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    press_ctrl_c(monkeypatch, terminal, "wrapped")
    lines, err, blocks = talk(["Describe the image in detail.", QUESTIONS[1]])
    assert err == "" and len(lines[0].split()) == 1 and lines[2] and "tokens held" in lines[3]
    assert len(blocks) == 2 and blocks[1] < 30 and signal.getsignal(signal.SIGINT) is before


def test_a_question_that_is_interrupted_or_cannot_be_used_is_dropped_and_the_chat_goes_on(talk, monkeypatch):
    first, _, second, _ = talk(QUESTIONS[:2])[0]
    reading = itertools.count()
    press_ctrl_c(monkeypatch, terminal.tqdm, "update", lambda bar, *_: bar.total == 8 and next(reading) == 11)  # layers
    lines, err, blocks = talk([QUESTIONS[0], "What is <image>?", QUESTIONS[2], QUESTIONS[1]])
    assert "2 <image> and 1 images were given" in err and err.endswith("\nThe question is dropped.\n")
    assert lines[0:3:2] == [first, second] and len(lines) == 4 and len(blocks) == 3


REFUSED = {
    "is not a budget": ["--budget 0", "--budget 1.5", "--budget nan", "--budget much"],
    "argument --max-new-tokens": ["--max-new-tokens 0", "--max-new-tokens many"],
    "positions": ["--max-new-tokens 100000", f"--prompt {'redcircle' * 2000}"],
    "sampling needs": ["--temperature -1", "--temperature nan", "--top-p 0"],
    "argument --seed": [f"--seed {2**70}", "--seed -1"],
    "argument --scene": ["--scene -1", f"--scene {2**63}"],
    "not allowed with argument": ["--scene 7 --image a.png"],
    "give one --scene": ["--save-scene a.png", "--scene 1 --scene 2 --json", "--scene 1 --scene 2 --chat"],
    "no image at missing.png": ["--image missing.png"],
    "is not an image that can be read": ["--image README.md"],
    "no config.json": ["--model tests"],
    "no folder": ["--model nowhere/at/all"],
    "Check the id and the network": ["--model someone/unknown-model"],
    "2 <image> and 1 images": [f"--image {PICTURE} --prompt <image><image>"],
    "as UTF-8 text": ["--prompt \udcff"],
    "device": ["--device quantum", "--device meta", "--device hpu", "--device privateuseone"],
    "leave out --json and --prompt": ["--chat --json", "--chat --prompt Why?"],
    "one --budget and one --method": ["--chat --budget 0.2 --budget 0.5", "--chat --method h2o --method local"],
    "invalid choice": ["--method nothing", "--kv-bits 5"],
    "--plan takes the place": ["--method h2o --plan plan.json"],
    "holds no plan": ["--plan missing.json", "--plan README.md"],
}


@pytest.mark.parametrize("word, arguments", [(word, one.split()) for word, lines in REFUSED.items() for one in lines])
def test_bad_input_gets_one_sentence_and_exit_code_2(run, monkeypatch, word, arguments):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert word in (sentence := err.splitlines()[-1]) and len(sentence) > 20


def test_weights_that_are_no_number_and_a_plan_for_other_layers_are_refused_too(run, small, tmp_path):
    folder = shutil.copytree(small[0], tmp_path / "broken")
    query = "language_model.model.layers.3.self_attn.q_proj.weight"
    edit_weights(folder, lambda state: state[query][0].fill_(float("nan")))
    (tmp_path / "plan.json").write_text("[0.5, 0.5]")
    for arguments, word in (
        (("--model", str(folder), "--prompt", "yes"), "NaN or infinity"),
        (("--plan", str(tmp_path / "plan.json")), "2 layers"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and word in err
