"""The page as text: it is whole, it needs nothing else, and nothing that a model wrote is markup."""

import json
import re
from html.parser import HTMLParser

import pytest
from report_runs import ATTACK

from stateset_lightning.cli.main import main
from stateset_lightning.cli.report import render, write_report
from stateset_lightning.cli.report.run_data import read_run


class Elements(HTMLParser):
    """Elements with their attributes, and the text inside each script and style."""

    def __init__(self, page):
        super().__init__()
        self.found, self.raw, self.ids = [], [], set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.ids.add(dict(attrs).get("id"))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data):
        if self.cdata_elem is not None:
            self.raw[-1] += data


def test_what_a_model_wrote_is_data_and_nothing_else(run):
    page = render(read_run(run))
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "img" not in [tag for tag, _ in elements.found]
    style, data, script = elements.raw
    assert json.loads(data)["train"][0]["completions"][3]["text"] == ATTACK  # unchanged
    assert not re.search(r"[<>&]", data)
    assert "{{" not in script + style
    # The script never makes markup of a text.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|DOMParser", script)


def test_the_page_needs_nothing_else(run):
    page = render(read_run(run))
    (policy,) = [attributes["content"] for tag, attributes in Elements(page).found if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    outside = page.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    assert not re.search(
        r"https?://|//cdn|@import|url\(|fetch\(|XMLHttp|<link|src=",
        outside.replace(json.dumps(ATTACK)[1:-1], "").split('id="data"')[0],
    )
    assert not re.search(r"https?://|fetch\(|XMLHttp|import\(", outside.rsplit("<script>", 1)[1])


def test_every_control_has_a_name_and_every_link_a_target(run):
    elements = Elements(render(read_run(run)))
    assert {attributes["href"][1:] for tag, attributes in elements.found if tag == "a"} <= elements.ids
    labelled = re.findall(r"<label>[^<]+<(?:input|select) id=\"(\w+)\"", render(read_run(run)))
    for tag, attributes in elements.found:
        if tag in ("input", "select", "button"):
            assert "aria-label" in attributes or attributes["id"] in labelled, attributes
    assert dict(elements.found)["html"]["lang"] == "en"


def test_the_command_writes_the_page_and_says_where(run, tmp_path, capsys):
    main(["report", str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    main(["report", str(run), "--output", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").read_text() == (run / "report.html").read_text()
    assert not list(run.glob(".*partial"))


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys):
    for words in (["report"], ["report", str(tmp_path)], ["report", str(tmp_path / "gone")]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("stateset-lightning: error: ")
        assert len(said.splitlines()) == 1


def test_a_page_that_cannot_be_made_leaves_the_old_one(run):
    page = write_report(run)
    before = page.read_text()
    (run / "environment.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        write_report(run)
    assert page.read_text() == before


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(tint, ground, share):
    return "#" + "".join(
        f"{round(share * int(tint[i : i + 2], 16) + (1 - share) * int(ground[i : i + 2], 16)):02x}" for i in (1, 3, 5)
    )


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_all_text_can_be_read(run, theme):
    blocks = re.findall(
        r":root(?:\[data-theme=\"dark\"\])? \{(.*?)\}", Elements(render(read_run(run))).raw[0], flags=re.DOTALL
    )
    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[theme]))
    for ground in ("page", "card"):
        for text in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        for curve in (f"c{k}" for k in range(8)):
            assert contrast(colour[curve], colour[ground]) >= 3, (curve, ground)
    assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
    for tint in ("up", "down", "rare"):
        assert contrast(colour["ink"], mixed(colour[tint], colour["card"], 0.55)) >= 4.5, tint
