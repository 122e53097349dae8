"""The report as a person sees it: laid out and painted by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from quatro_ray.telemetry.report import write_report
from tests.unit.telemetry.run_maker import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (1300, 520)
TEXT = "I add them.\n\n3 + 4 = 7, and nothing_breaks_" + "here" * 100 + "\n<answer>7</answer>"
FIRST_BLUE = (0x1F, 0x77, 0xB4)
"""Colour of the first line or bar of a plot."""
MEASURE = """<script>
const box = e => {
  const r = e.getBoundingClientRect();
  return [r.left, r.top + scrollY, r.right, r.bottom + scrollY]; };
const figures = [...document.querySelectorAll('figure')].map(f => ({
  title: f.querySelector('figcaption').innerText, box: box(f), caption: box(f.querySelector('figcaption')),
  svg: box(f.querySelector('svg')),
  texts: [...f.querySelectorAll('svg g[id^=text], svg g[id^=legend]')].map(box),
}));
const pres = [...document.querySelectorAll('article pre')].map(p => ({
  box: box(p), text: p.innerText, overflow: p.scrollWidth - p.clientWidth }));
const all = {width: innerWidth, page: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight, figures, pres};
document.body.innerHTML = '<pre id=measured></pre>';
document.getElementById('measured').textContent = JSON.stringify(all);
</script>"""

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed: apt install chromium"),
]


@dataclass
class Seen:
    """What the browser measured, in CSS pixels from the page's upper left corner, and the picture that it painted.

    `picture`: uint8 [height, width, 3].
    """

    layout: dict[str, Any]
    picture: NDArray[np.uint8]

    def part(self, box: list[float]) -> NDArray[np.uint8]:
        left, top, right, bottom = (round(v) for v in box)
        return self.picture[top:bottom, left:right]


def browse(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None
    # root may not use Chromium's own sandbox; the page is ours and loads nothing
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([BROWSER, *fixed, profile, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(folder: Path, report: Path, width: int) -> Seen:
    measuring = folder / "measuring.html"
    measuring.write_text(report.read_text() + MEASURE)
    page = browse(folder, f"--window-size={width},1000", "--dump-dom", measuring.as_uri())
    found = re.search('<pre id="measured">(.*?)</pre>', page, re.DOTALL)
    assert found, page[-2000:]
    layout = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    picture = folder / "picture.png"
    browse(folder, f"--window-size={width},{layout['height']}", f"--screenshot={picture}", report.as_uri())
    pixels = (matplotlib.image.imread(picture)[:, :, :3] * 255).round().astype(np.uint8)
    return Seen(layout, pixels)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("browser") / "run", num_steps=24, response=TEXT))


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The report in a window of this many CSS pixels."""
    seen = look(tmp_path_factory.mktemp("window"), report, request.param)
    assert seen.picture.shape[:2] == (seen.layout["height"], seen.layout["width"])
    return seen


def is_inside(inner: list[float], outer: list[float]) -> bool:
    """With a pixel of tolerance, since glyphs are rounded."""
    return all(i >= o - 1 for i, o in zip(inner[:2], outer[:2], strict=True)) and all(
        i <= o + 1 for i, o in zip(inner[2:], outer[2:], strict=True)
    )


def test_nothing_is_wider_than_the_window(seen: Seen) -> None:
    assert seen.layout["page"] <= seen.layout["width"]
    assert [p["text"] for p in seen.layout["pres"] if p["overflow"] > 0] == []


def test_titles_and_labels_are_whole(seen: Seen) -> None:
    window = [0, 0, seen.layout["width"], seen.layout["height"]]
    assert len(seen.layout["figures"]) > 25
    for figure in seen.layout["figures"]:
        assert is_inside(figure["caption"], window) and is_inside(figure["svg"], window), figure["title"]
        assert len(figure["texts"]) > 3, figure["title"]
        outside = [text for text in figure["texts"] if not is_inside(text, figure["svg"])]
        assert outside == [], figure["title"]


def test_plots_do_not_cover_each_other(seen: Seen) -> None:
    boxes = [f["box"] for f in seen.layout["figures"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_plot_is_painted(seen: Seen) -> None:
    """Its first line or bar is there in its colour, on white, and its title is dark text."""
    for figure in seen.layout["figures"]:
        plot = seen.part(figure["svg"])
        is_blue = (np.abs(plot.astype(int) - FIRST_BLUE) < 12).all(2)
        assert is_blue.sum() > 20, figure["title"]
        assert (plot == 255).all(2).mean() > 0.2, figure["title"]
        assert (seen.part(figure["caption"]) < 100).all(2).sum() > 50, figure["title"]


def test_rollouts_are_read_line_by_line(seen: Seen) -> None:
    texts = [p["text"] for p in seen.layout["pres"]]
    assert "What is 3 + 4?\nThink first." in texts and TEXT in texts
    for shown in seen.layout["pres"]:
        if shown["text"] == TEXT and shown["box"][3] > shown["box"][1]:  # folded ones have no height
            lines = np.any(np.all(seen.part(shown["box"]) < 100, axis=2), axis=1)
            assert (lines[1:] & ~lines[:-1]).sum() >= 3
