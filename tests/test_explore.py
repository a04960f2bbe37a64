"""The explorer: what it shows is what the model and the methods do, texts stay texts, the page works in a browser."""

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
from PIL import Image

import weights
from bench import plan
from minillava import explore
from minillava.checks import LlavaError
from minillava.compressors import METHODS
from minillava.model import manual_attention

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = '</script><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>'
IMAGE = Image.open(TINY / "examples" / "scene_1.png")
SHOWN = ["prefixkv", *(name for name in METHODS if name != "prefixkv")]


@pytest.fixture(scope="module")
def data(small):
    """All that a page shows of a random model, whose prompt and name try to be HTML."""
    _, _, model, processor = small
    prompt, budgets = f"USER: <image>\n{NASTY} ASSISTANT:", (0.5, 0.2)
    found = explore.collect(model, processor, prompt, [IMAGE], budgets, f"somewhere/{NASTY[-9:]}", SHOWN)
    return found | explore.answers(model, processor, prompt, [IMAGE], budgets, 2, SHOWN)


def kept(data, layer: int, stop: int, method: int = 0) -> list[bool]:
    """Which tokens of the prompt a layer keeps at a stop of the budget: the bits of the page's hexadecimal digits."""
    digits = data["methods"][method]["kept"][stop][layer]
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][: len(data["importance"][0])]


@pytest.mark.parametrize("number", range(len(SHOWN)), ids=SHOWN)
def test_the_tokens_shown_are_those_that_a_cache_keeps(small, data, number):
    _, _, model, processor = small
    for stop, budget in [pair for pair in enumerate(data["budgets"]) if pair[1] in (0.05, 0.35, 1.0)]:
        cache = model.new_cache(1, METHODS[SHOWN[number]](budget))
        model.read(**processor(data["prompt"], [IMAGE]), cache=cache)
        for layer, position in enumerate(cache.position[:, 0]):
            shown = [token for token, here in enumerate(kept(data, layer, stop, number)) if here]
            assert shown == position[position >= 0].sort().values.tolist()


def test_where_the_model_looks_is_the_last_tokens_attention_and_the_page_opens_where_it_is_sharpest(small, data):
    _, _, model, processor = small
    inputs, sharp = processor(data["prompt"], [IMAGE]), []
    hidden = model.embed(inputs["input_ids"], inputs["pixel_values"])
    rope = model.language_model.cos_sin(torch.arange(hidden.shape[1])[None])
    for layer, looks in zip(model.language_model.layers, data["looks"]):
        heads = manual_attention(*layer.self_attn.project(layer.input_layernorm(hidden), rope), None)[1]
        assert looks == pytest.approx(heads[0, :, -1].mean(0).tolist(), abs=2e-5)
        sharp.append(sum(sorted((looks[position] for position in data["patches"]), reverse=True)[:10]))
        hidden = layer(hidden, rope)
    assert sharp[data["layer"]] == max(sharp)


def test_the_page_has_the_models_name_every_token_once_and_the_picture_that_the_model_sees(small, data):
    assert data["model"] == NASTY[-9:]
    positions = sorted(data["patches"] + [position for position, _ in data["words"]])
    assert positions == list(range(len(data["importance"][0])))
    picture = Image.open(io.BytesIO(base64.b64decode(data["image"].split(",")[1])))
    side = small[2].config.vision.image_size
    assert picture.size == (side, side) and len(data["patches"]) == data["columns"] ** 2
    assert picture.tobytes() == IMAGE.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).tobytes()
    assert explore.seen_image(torch.zeros(3, 30, 30), small[3], 8).size == (24, 24)  # less than a patch is cut off


def test_curves_rise_from_0_to_1_and_the_threshold_with_the_budget(data):
    for curve in data["curves"]:
        assert curve[0] == 0 and curve[-1] == 1 and curve == sorted(curve)
    assert data["thresholds"] == sorted(data["thresholds"]) and data["thresholds"][-1] == 1


def test_words_in_one_text_only_are_marked():
    left, right = explore.words("a red ring here", "a blue ring")
    assert left == [(True, "a"), (False, "red"), (True, "ring"), (False, "here")]
    assert right == [(True, "a"), (False, "blue"), (True, "ring")]


def test_the_page_needs_no_network_and_text_that_is_html_stays_text(data):
    text = explore.page(data | {"words": [(0, NASTY)]})  # as if it were one token
    assert "<script>document" not in text and "<img" not in text and text.count("<script") == 2
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:|@import|url\(['\"]?http", text)


def test_without_an_image_there_is_nothing_to_explore(small):
    with pytest.raises(LlavaError, match="without an image"):
        explore.collect(*small[2:], "Hello", [], [0.2])


def refused(command, *arguments):
    """Whether a command ends with 2, before it has done anything or afterwards."""
    try:
        return command([*arguments]) == 2
    except SystemExit as stop:
        return stop.code == 2


def test_the_commands_write_page_plan_and_picture_and_how_far_they_are(tmp_path, capsys, small, monkeypatch):
    page, saved, picture = (str(tmp_path / name) for name in ("a.html", "a.json", "a.png"))
    model = ("--model", str(small[0]))
    monkeypatch.setattr(explore.terminal, "SLOW", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert explore.main([page, *model, "--max-new-tokens", "1", "--scene", "7"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{page}, with 53 answers, in \d+ s\.\n", out)
    for part in ("loading: ", "reading the prompt: ", "choosing: ", "answering: cover 20%: ", "/53 ["):
        assert part in err
    assert plan.main(["--save", saved, "--plot", picture, *model]) == 0
    assert os.path.getsize(page) > 10_000 and Image.open(picture).width > 1000
    found = weights.read_plan(saved)
    assert found.budget == 0.2 and sum(found.ratios) / 4 == pytest.approx(0.2, abs=0.01)
    assert plan.main(["--save", saved, "--method", "h2o", "--budget", "40%", *model]) == 0
    ratios = weights.read_plan(saved).ratios
    assert max(ratios) - min(ratios) < 0.02 < max(found.ratios) - min(found.ratios)  # a token more or less
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.json", "a.png"]


@pytest.mark.parametrize("command, options", [
    (explore.main, ["--max-new-tokens", "1", "--method", "h2o", "--budget", "20%"]), (plan.main, ["--save"]),
    (plan.main, ["--plot"]),
], ids=["explore", "save", "plot"])  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_and_nothing_is_left(
    tmp_path, capsys, small, command, options, monkeypatch
):
    monkeypatch.setattr("minillava.files.secrets.token_hex", lambda count: "x")
    monkeypatch.setattr(plan, "plot", lambda *arguments: b"a picture")  # drawing takes long
    names = ["no/a.png", ".", "x" * 249 + ".png"]  # 253: too long for the name at first
    if os.path.exists("/dev/full"):
        (tmp_path / "full.png.x.part").symlink_to("/dev/full")  # no space is left there
        names.append("full.png")
    for name in names:
        assert refused(command, *options, str(tmp_path / name), "--model", str(small[0]))
        assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, word", [
    ([], "nothing to write"), (["--plot", "kept.pgf"], ".png, .pdf, .svg"), (["--plot", "a.png"], "needs matplotlib"),
    (["--save", "a", "--budget", "2"], "is not a budget"),
    (["--save", "a.json", "--scene", "1", "--image", "b.png"], "--scene"),
])  # fmt: skip
def test_bad_options_of_a_plan_are_refused(capsys, monkeypatch, arguments, word):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(plan.main, *arguments)
    shown = capsys.readouterr()
    assert word in shown.err.splitlines()[-1] and not shown.out


HARNESS = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
for (const name of ["error", "warn"]) console[name] = text => errors.push(String(text));
addEventListener("load", () => {
  const look = () => ({
    ...Object.fromEntries([...document.querySelectorAll("p[id], b[id], h2, output")].map(n => [n.id, n.textContent])),
    dropped: document.querySelectorAll("#grid .dropped").length,
    bright: [...$("looks").children].findIndex(cell => /, 0\\)$/.test(cell.style.background)),
    level: document.querySelector(".level").getAttribute("y1"),
    hidden: document.querySelector(".level").getAttribute("visibility"),
    bar: document.querySelector(".bar.on").getAttribute("height"),
    words: document.querySelectorAll("#prompt .kept").length, rows: $("patch-rows").children.length,
  });
  const move = (id, value) => {
    $(id).value = value;
    $(id).dispatchEvent(new Event(id === "method" ? "change" : "input"));
    return look();
  };
  const bottom = Math.max(...["looks-text", "kept-text"].map(id => $(id).getBoundingClientRect().bottom));
  const result = {bottom, start: look(), layer: move("layer", 3), all: move("budget", data.budgets.length - 1)};
  document.querySelector("#grid button").focus();
  for (const key of ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowDown"])
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  result.keys = look();
  move("budget", data.start);
  result.method = move("method", data.methods.length - 1);
  result.hidden = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  result.labels = [...document.querySelectorAll("input, select")].every(field => field.labels.length);
  result.title = document.title; result.errors = errors;
  parent.postMessage([innerWidth, result], "*");
});
</script>"""
OUTER = """<script>
const results = [];
addEventListener("message", event => {
  if (results.push(event.data) === 2) document.body.textContent = `results:${JSON.stringify(results)}:end`;
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_the_page_works_in_a_browser_without_a_message_on_a_wide_screen_and_on_a_telephone(tmp_path, data):
    path, page = tmp_path / "outer.html", html.escape(explore.page(data).replace("</head>", HARNESS + "</head>"))
    frames = [f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in (1280, 375)]
    path.write_text("".join([OUTER, *frames]), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,2000", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"results:(\[.*\]):end", done.stdout, re.DOTALL)
    assert found, done.stdout[-1000:] + done.stderr[-1000:]
    results = dict(json.loads(html.unescape(found[1])))
    seen, narrow = results[1280], results[375]  # of which the bar for scrolling takes 15
    assert seen.pop("bottom") <= 800 and narrow.pop("bottom")  # what the question leads to is seen without scrolling
    assert seen == narrow and seen["hidden"] == 0 and seen["errors"] == [] and seen["labels"]
    assert seen["title"] == "What is kept of a KV cache" and seen["start"]["question"] == f"{NASTY} ASSISTANT:"
    start, layer, everything, other, stop = *(seen[name] for name in ("start", "layer", "all", "method")), data["start"]

    def dropped(layer: int, method: int = 0) -> int:
        here = kept(data, layer, stop, method)
        return sum(not here[position] for position in data["patches"])

    def answer(method: int, budget: float) -> list[str]:
        (run,) = (run for run in data["runs"] if (run["method"], run["budget"]) == (method, budget))
        return " ".join(text for _, text in run["right"]).split()

    looks = [data["looks"][data["layer"]][position] for position in data["patches"]]
    row, column = divmod(looks.index(max(looks)), data["columns"])
    assert start["bright"] == looks.index(max(looks))
    assert f"layer {data['layer']}, mean" in start["looks-text"]
    assert f"row {row + 1}, column {column + 1};" in start["looks-text"]
    assert start["dropped"] == dropped(data["layer"]) and start["layer-out"] == str(data["layer"])
    assert start["full"].split() == data["full"]["text"].split()
    assert start["compressed"].split() == answer(0, 0.2) and start["run-name"].endswith("prefixkv at 20 %")
    assert start["story"].startswith("Layer ") and "its attention is spread over many keys. Layer " in start["story"]
    assert layer["dropped"] == dropped(3) and layer["layer-out"] == "3"
    assert f"layer 3 keeps {sum(kept(data, 3, stop))} of" in layer["kept-text"]
    assert everything["dropped"] == 0 and everything["budget-out"] == "100 %"
    assert everything["compressed"].split() == answer(0, 0.5) and everything["run-name"].endswith("at 50 %")
    assert "get 100 % of" in everything["kept-text"] and everything["words"] == len(data["words"])
    assert float(everything["level"]) < float(layer["level"]) and float(everything["bar"]) == 250
    assert seen["keys"]["patch-text"].startswith("Patch in row 2, column 1;")
    assert seen["keys"]["rows"] == len(data["importance"])
    last = len(SHOWN) - 1
    assert other["dropped"] == dropped(3, last) and other["hidden"] == "hidden"
    assert other["story"].startswith(f"{SHOWN[last]} keeps") and other["compressed"].split() == answer(last, 0.2)
