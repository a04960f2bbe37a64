"""The explorer: what it shows is what PrefixKV does, texts stay texts, and the page works in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import weights
from bench import plan
from minillava import explore
from minillava.checks import LlavaError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
NASTY = '</script><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>'


@pytest.fixture(scope="module")
def image():
    return Image.open(TINY / "examples" / "scene_1.png")


@pytest.fixture(scope="module")
def data(tiny, image):
    model, processor = tiny
    prompt = processor.chat([("Describe the image in detail.", None)], 1)
    return shown(model, processor, prompt, image, (0.5, 0.2), 12, "somewhere/tiny")


def shown(model, processor, prompt, image, budgets, new_tokens, name=""):
    """All that a page shows."""
    found = explore.collect(model, processor, prompt, [image], budgets, name)
    return found | explore.answers(model, processor, prompt, [image], budgets, new_tokens)


@pytest.mark.parametrize("number", range(4))
def test_the_tokens_shown_are_those_that_a_cache_keeps(tiny, image, data, number, sweep):
    model, processor = tiny
    method = list(explore.SHOWN.values())[number]
    inputs = processor(data["prompt"], [image])
    budgets = data["budgets"]
    for stop, budget in enumerate(budgets):
        if not sweep and budget not in (budgets[0], 0.2, 0.5, 1.0):
            continue
        cache = model.new_cache(1, method(budget))
        model.read(**inputs, cache=cache)
        assert cache.kept[:, 0].tolist() == explore.counts(data, stop, number)
        for layer in range(8):
            positions = set(cache.position[layer, 0][cache.position[layer, 0] >= 0].tolist())
            found = explore.kept(data, layer, stop, number)
            assert {j for j, here in enumerate(found) if here} == positions


def test_the_page_names_the_model(data):
    assert data["model"] == "tiny"


def test_the_page_opens_on_the_layer_that_is_farthest_from_the_budget(data):
    kept = explore.counts(data, data["start"])
    away = [abs(count - data["budgets"][data["start"]] * len(data["importance"][0])) for count in kept]
    assert away[data["layer"]] == max(away)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_say_which_tokens_are_kept(keep):
    made = {"methods": [{"kept": [[explore.bits(torch.tensor(keep))]]}], "importance": [[0.0] * len(keep)]}
    assert explore.kept(made, 0, 0) == keep


def test_every_token_is_a_patch_or_a_word_once(data):
    positions = sorted(data["patches"] + [position for position, _ in data["words"]])
    assert positions == list(range(len(data["importance"][0])))
    assert len(data["patches"]) == data["columns"] ** 2


def test_the_picture_is_what_the_model_sees(tiny, image, data):
    shown = Image.open(io.BytesIO(base64.b64decode(data["image"].split(",")[1])))
    side = tiny[0].config.vision.image_size
    assert shown.size == (side, side)
    expected = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    assert shown.tobytes() == expected.tobytes()


def test_a_border_narrower_than_a_patch_is_not_shown(tiny):
    pixels = torch.zeros(3, 30, 30)
    assert explore.seen_image(pixels, tiny[1], 8).size == (24, 24)


def test_curves_rise_from_0_to_1_and_the_threshold_with_the_budget(data):
    for curve in data["curves"]:
        assert curve[0] == 0 and curve[-1] == 1 and curve == sorted(curve)
    assert data["thresholds"] == sorted(data["thresholds"])
    assert data["thresholds"][-1] == 1


def test_words_in_one_text_only_are_marked():
    left, right = explore.words("a red ring here", "a blue ring")
    assert left == [(True, "a"), (False, "red"), (True, "ring"), (False, "here")]
    assert right == [(True, "a"), (False, "blue"), (True, "ring")]


def test_the_page_needs_no_network_and_is_small(data):
    text = explore.page(data)
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:|@import|url\(['\"]?http", text)


def test_text_that_is_html_stays_text(small, image):
    _, _, model, processor = small
    made = shown(model, processor, f"USER: <image>\n{NASTY} ASSISTANT:", image, (0.5,), 4, NASTY)
    made["words"].append((0, NASTY))  # as if it were one token
    text = explore.page(made)
    assert "<script>document" not in text and "<img" not in text
    assert text.count("<script") == 2


def test_without_an_image_there_is_nothing_to_explore(tiny):
    with pytest.raises(LlavaError, match="without an image"):
        explore.collect(*tiny, "Hello", [], [0.2])


# ---------------------------------------------------------------- the commands

COMMANDS = pytest.mark.parametrize(
    "command",
    [lambda path, *more: explore.main([path, *more]), lambda path, *more: plan.main(["--save", path, *more]),
     lambda path, *more: plan.main(["--plot", path, *more])],
    ids=["explore", "save", "plot"],
)  # fmt: skip


def refused(command, *arguments):
    """Whether a command ends with 2, before it has done anything or afterwards."""
    try:
        return command(*arguments) == 2
    except SystemExit as stop:
        return stop.code == 2


def test_the_commands_write_page_plan_and_picture(tmp_path, capsys):
    page, saved, picture = (str(tmp_path / name) for name in ("a.html", "a.json", "a.png"))
    assert explore.main([page, "--max-new-tokens", "4", "--scene", "7"]) == 0
    assert re.fullmatch(rf"{page}, with 9 answers, in \d+ s\.\n", capsys.readouterr().out)
    assert plan.main(["--save", saved, "--plot", picture]) == 0
    assert os.path.getsize(page) > 10_000 and Image.open(picture).width > 1000
    found = weights.read_plan(saved)
    assert found.budget == 0.2 and sum(found.ratios) / 8 == pytest.approx(0.2, abs=1e-3)
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.json", "a.png"]


def test_a_plan_is_saved_for_every_method(tmp_path):
    path = str(tmp_path / "plan.json")
    assert plan.main(["--save", path, "--method", "h2o", "--budget", "40%"]) == 0
    ratios = weights.read_plan(path).ratios
    assert len(ratios) == 8 and max(ratios) - min(ratios) < 0.002  # as many in every layer; PrefixKV's are 0.09 apart


def test_how_far_it_is_shows_on_a_terminal(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(explore.terminal, "SLOW", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert explore.main([str(tmp_path / "a.html"), "--model", str(small[0]), "--max-new-tokens", "2"]) == 0
    err = capsys.readouterr().err
    assert "loading: " in err and "reading the prompt: " in err and "answering: " in err and "/9 [" in err


@COMMANDS
def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, capsys, small, command):
    for name in ("no/a.png", ".", "x" * 249 + ".png", "x" * 5000 + ".png"):  # 253: too long for the name it gets first
        assert refused(command, str(tmp_path / name), "--model", str(small[0]))
        assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@COMMANDS
def test_a_write_that_fails_ends_with_2_and_leaves_nothing(tmp_path, capsys, small, command, monkeypatch):
    monkeypatch.setattr("minillava.files.secrets.token_hex", lambda count: "x")
    (tmp_path / "a.png.x.part").symlink_to("/dev/full")  # no space is left there
    assert refused(command, str(tmp_path / "a.png"), "--model", str(small[0]))
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, word",
    [([], "nothing to write"), (["--plot", "kept.pgf"], ".png, .pdf, .svg"), (["--plot", "a.png"], "needs matplotlib"),
     (["--plot", "a.png", "--method", "h2o"], "--method"), (["--save", "a", "--budget", "2"], "is not a budget"),
     (["--save", "a.json", "--scene", "1", "--image", "b.png"], "--scene")],
)  # fmt: skip
def test_bad_options_of_a_plan_are_refused(capsys, monkeypatch, arguments, word):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(plan.main, arguments)
    shown = capsys.readouterr()
    assert word in shown.err.splitlines()[-1] and not shown.out


# ---------------------------------------------------------------- in a browser

HARNESS = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
for (const name of ["error", "warn"]) console[name] = text => errors.push(String(text));
addEventListener("load", () => {
  const result = {};
  const look = () => ({
    dropped: document.querySelectorAll("#grid .dropped").length, text: $("kept-text").textContent,
    level: document.querySelector(".level").getAttribute("y1"),
    bar: document.querySelector(".bar.on").getAttribute("height"),
    words: document.querySelectorAll("#prompt .kept").length, layer: $("layer-out").textContent,
    budget: $("budget-out").textContent, rows: $("patch-rows").children.length, patch: $("patch-text").textContent,
    answer: $("compressed").textContent, story: $("story").textContent, name: $("run-method").textContent,
    hidden: document.querySelector(".level").getAttribute("visibility"),
    marks: document.querySelectorAll("mark").length,
  });
  const move = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
  result.start = look();
  move("layer", 5); result.layer = look();
  move("budget", data.budgets.length - 1); result.all = look();
  document.querySelector("#grid button").focus();
  for (const key of ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowDown"])
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  result.keys = look();
  const run = number => { $("run").value = number; $("run").dispatchEvent(new Event("change")); };
  run(0); result.first = look();
  run(1);
  move("budget", data.start);
  $("method").value = 1; $("method").dispatchEvent(new Event("change")); result.method = look();
  result.width = document.documentElement.scrollWidth; result.inner = innerWidth;
  result.labels = [...document.querySelectorAll("input, select")].every(field => field.labels.length);
  result.title = document.title; result.errors = errors;
  document.body.innerHTML = "";
  const told = document.createElement("pre");
  told.id = "result";
  told.textContent = JSON.stringify(result);
  document.body.append(told);
});
</script>"""


def visit(page: str, folder, width: int) -> dict:
    """Opens a page in headless Chromium, uses it, and returns what was seen."""
    path = folder / "page.html"
    path.write_text(page.replace("</head>", HARNESS + "</head>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-1000:] + done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


@browser
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium makes no window narrower than 500
def test_the_page_works_in_a_browser_without_a_message(tmp_path, data, width):
    seen = visit(explore.page(data), tmp_path, width)
    assert seen["errors"] == []
    assert seen["width"] <= seen["inner"]  # nothing to scroll sideways
    assert seen["labels"]
    start, layer, everything = seen["start"], seen["layer"], seen["all"]
    stop = data["start"]

    def dropped(layer: int, method: int = 0) -> int:
        here = explore.kept(data, layer, stop, method)
        return sum(not here[position] for position in data["patches"])

    lowest = " ".join(text for _, text in data["runs"][1]["right"]).split()  # as the slider's budget
    assert start["answer"].split() == lowest != seen["first"]["answer"].split()
    assert start["dropped"] == dropped(data["layer"]) and start["layer"] == str(data["layer"])
    assert start["story"].startswith("Layer ") and "its attention is spread over many keys. Layer " in start["story"]
    assert layer["dropped"] == dropped(5) and layer["layer"] == "5"
    assert f"keeps {explore.counts(data, stop)[5]} of" in layer["text"]
    assert everything["dropped"] == 0 and everything["budget"] == "100 %"
    assert everything["words"] == len(data["words"])
    assert float(everything["level"]) < float(layer["level"]) and float(everything["bar"]) == 250
    assert seen["keys"]["patch"].startswith("Patch in row 2, column 1;") and seen["keys"]["rows"] == 8
    other = seen["method"]
    assert other["dropped"] == dropped(5, 1) and other["name"] == "cover" and other["hidden"] == "hidden"
    assert other["story"] == "cover keeps 20 % in every layer."
    assert other["answer"].split() == " ".join(text for _, text in data["runs"][3]["right"]).split()


@browser
def test_a_prompt_that_is_html_does_nothing_in_a_browser(tmp_path, small, image):
    _, _, model, processor = small
    made = shown(model, processor, f"USER: <image>\n{NASTY} ASSISTANT:", image, (0.5, 0.2), 4, NASTY)
    seen = visit(explore.page(made), tmp_path, 800)
    assert seen["title"] == "What is kept of a KV cache" and seen["errors"] == []
