"""The page in a real browser: headless Chromium opens it, a script uses it, and its console stays empty."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_runs import ATTACK, completion, write_samples

from stateset_lightning.cli.report import render, script_safe
from stateset_lightning.cli.report.run_data import read_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,  # starts a browser
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed"),
]

# The page stands in a frame of a page that uses it: its own policy would not let a further script run.
AROUND = """<!doctype html><body><iframe id="frame" width="{width}" height="900"></iframe><script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = (selector) => [...page.querySelectorAll(selector)], one = (selector) => page.querySelector(selector);
  const texts = (selector) => all(selector).map((element) => element.textContent);
  const press = (selector, label) => all(selector).find((element) => element.textContent === label).click();
  const set = (id, value, kind) => {{
    one("#" + id).value = value;
    one("#" + id).dispatchEvent(new view.Event(kind, {{bubbles: true}}));
  }};
  let result;
  try {{ result = (() => {{ {script} }})(); }} catch (error) {{ result = {{error: String(error)}}; }}
  document.body.dataset.result = JSON.stringify(result);
}});
frame.srcdoc = {page};
</script></body>"""


def use(run: Path, script: str, width: int = 1200) -> Any:
    """What a script returns that has the page before it; fails if the browser's console says anything."""
    file = run / "around.html"
    file.write_text(
        AROUND.format(width=width, script=script, page=script_safe(render(read_run(run)))), encoding="utf-8"
    )
    assert CHROMIUM is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={run / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command = [CHROMIUM, *options, "--window-size=1300,1000", "--virtual-time-budget=4000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert not (isinstance(result, dict) and "error" in result), result
    return result


def test_it_shows_the_run_and_runs_nothing_that_a_model_wrote(run: Path) -> None:
    seen = use(
        run,
        """return {ready: page.documentElement.dataset.ready, title: page.title, images: all("img").length,
            said: texts(".said"), tiles: texts(".tile .value"), charts: texts(".chart h3"),
            curves: all(".chart path.curve").length, push: texts(".push"), scores: texts(".score"),
            table: texts("#evaluation td, #evaluation th"), config: one("#config pre").textContent,
            environment: texts("#environment dd"), chips: texts(".chip"),
            labels: all(".chart svg").map((image) => image.getAttribute("aria-label"))}""",
    )
    assert seen["ready"] == "true"
    assert (seen["title"], seen["images"]) == ("task/version_0", 0)
    assert seen["said"][0] == "2<|end|>"
    assert seen["said"][1].startswith(ATTACK)
    assert seen["said"][1].endswith("right: KeyError: <b>")
    assert [text.split() for text in seen["scores"]] == [["1", "3", "times"], ["failed"]]
    assert seen["tiles"][:2] == ["0.25 → 0.75", "0.1 → 0.5"]
    assert seen["charts"] == ["Reward", "Groups, share"]
    assert seen["curves"] == 3  # training raw and smoothed, validation
    assert seen["labels"][0] == "Reward: training 0.1 at step 1, 0.5 at step 5"
    assert seen["table"][5:10] == ["reward", "0.25 ± 0.1", "0.75 ± 0.2", "+0.5", ""]
    assert "# </pre><b>" in seen["config"]
    assert seen["environment"] == ["3.12.1", "<b>cpu</b>"]
    assert "target 2" in seen["chips"]


def test_an_environments_tokens_are_grey_and_the_models_coloured(tmp_path: Path) -> None:
    tokens = ["2", "<|end|>", "\nuser: Sure?\n", "Yes"]
    values = {"logprobs": [-0.5, -1.0, None, -0.5], "logprobs_after": [-0.25, -1.5, None, -0.25]}
    write_samples(tmp_path, [completion("[assistant] 2\n[user] Sure?\n[assistant] Yes", 1.0, tokens=tokens, **values)])
    seen = use(
        tmp_path,
        """const view_of = (selector) => texts(".said " + selector);
        return {grey: view_of(".tok.theirs"), coloured: view_of(".tok.up"), all: one(".said").textContent};""",
    )
    assert seen == {"grey": ["↵\nuser: Sure?↵\n"], "coloured": ["2", "Yes"], "all": "2<|end|>↵\nuser: Sure?↵\nYes"}


def test_everything_can_be_chosen(run: Path) -> None:
    seen = use(
        run,
        """const seen = {tabs: texts("#groups button")};
        press("#groups button", "groups"); seen.charts = texts(".chart h3");
        set("smoothing", 0, "input"); seen.raw = all(".chart path.raw").length;
        const up = all(".tok.up").map((token) => [token.textContent, token.style.getPropertyValue("--a")]);
        seen.up = up[0]; seen.down = all(".tok.down")[0].textContent; seen.legend = one("#legend").textContent;
        one(".tok").dispatchEvent(new view.PointerEvent("pointerover", {bubbles: true}));
        seen.tip = one("#tip").textContent;
        set("colour", "surprise", "change");
        seen.rare = all(".tok.rare").length; seen.coloured = all(".tok.up, .tok.down").length;
        one(".size summary").click(); one(".size").dispatchEvent(new view.Event("toggle"));
        seen.rows = texts(".size tr").slice(0, 2);
        one("#next").click(); seen.place = one("#place").textContent; seen.last = one("#next").disabled;
        seen.breakdown = texts(".score small");
        press("#views button", "validation"); seen.steps = texts(".push small"); seen.prompts = texts(".prompt");
        set("filter", "better", "change"); seen.better = texts(".prompt");
        set("filter", "all", "change"); set("find", "V2", "input"); seen.found = texts(".prompt");
        set("find", "nothing", "input"); seen.none = one("#place").textContent;
        const theme = () => page.documentElement.dataset.theme, before = theme();
        one("#theme").click(); seen.theme = before !== theme();
        return seen""",
    )
    assert seen["tabs"] == ["Overview", "train", "val", "groups"]
    assert seen["charts"] == ["groups/all_right", "groups/all_wrong", "groups/mixed"]
    assert seen["raw"] == 0
    assert seen["up"] == ["2", "28"]  # 0.25 of the 0.5 nats at which a colour is full, which is 55%
    assert seen["down"] == "<|end|>"
    assert "÷1.65" in seen["legend"]  # exp(0.5)
    assert seen["tip"].splitlines() == ['"2"', "probability when sampled 0.607", "after the update 0.779 (×1.28)"]
    assert (seen["rare"] > 0, seen["coloured"]) == (True, 0)
    assert seen["rows"] == ["tokenlog-prob when sampledafter the update", '"2"−0.5−0.25']
    assert (seen["place"], seen["last"]) == ("step 5, episode 4", True)
    assert "right.<i> 1" in seen["breakdown"]
    assert seen["prompts"] == ["question v1", "question v2"]
    assert seen["steps"] == ["step 0", "step 5", "step 0", "step 5"]
    assert (seen["better"], seen["found"], seen["none"]) == (["question v1"], ["question v2"], "nothing found")
    assert seen["theme"]


def test_it_fits_a_phone(run: Path) -> None:
    write_samples(run, [completion("a" * 300, 1.0), completion("word " * 100, 0.0)])
    script = """const right = (e) => e.getBoundingClientRect().right;
        const outside = (e) => right(e) > view.innerWidth + 1 && !e.closest("pre, .scroll");
        const wide = all("main *").filter(outside).map((element) => element.tagName);
        return {inner: view.innerWidth, width: page.documentElement.scrollWidth, wide}"""
    seen = use(run, script, width=360)
    assert seen["width"] <= seen["inner"] <= 360
    assert seen["wide"] == []


@pytest.mark.parametrize("gone", [["metrics.csv", "config.yaml", "environment.json"], ["samples.jsonl"]])
def test_what_is_missing_is_said(run: Path, gone: list[str]) -> None:
    for name in gone:
        (run / name).unlink()
    seen = use(run, 'return {ready: page.documentElement.dataset.ready, text: one("main").innerText}')
    assert seen["ready"] == "true"
    for name in gone:
        assert f"{name} is not in the run's folder" in seen["text"]
