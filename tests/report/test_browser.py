"""The page in a real browser: what it shows, that it asks for nothing, that it fits; light and dark, wide and narrow.

A probe script is added to a copy of the page, whose content policy is widened by as much as lets scripts run, the
page's enemies' too. Whatever the page asks for, at any address, breaks that policy, and the probe notes it. What it saw
stands in the dumped document.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from fettle.report.page import render
from tests.report.sample import compression, hostile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
DARK, LIGHT = "0", "1"

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PROBE = """<script>
const requests = [];
addEventListener("securitypolicyviolation", (event) => requests.push(event.blockedURI));
addEventListener("load", () => {
  const seen = (node) => getComputedStyle(node);
  document.querySelectorAll("details").forEach((node) => (node.open = true));
  const wide = [...document.querySelectorAll("body *")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.right > innerWidth + 1 && !node.closest(".scroll, pre");
  });
  const letters = [...document.querySelectorAll("svg text")].map((node) => {
    const place = node.getScreenCTM();
    return parseFloat(seen(node).fontSize) * Math.hypot(place.a, place.b);
  });
  parent.document.body.dataset.seen = JSON.stringify({
    width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, wide: wide.map((n) => n.outerHTML),
    requests, title: document.title, text: document.body.innerText, letters: Math.min(...letters),
    ground: seen(document.body).backgroundColor, ink: seen(document.body).color,
  });
});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; .ci/run installs Debian's")


def browse(folder: Path, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def look(folder: Path, page: str, *, width: int, tone: str) -> dict:
    """What the probe saw of `page` in a window of that width (a frame of that width: a window is at least 500)."""
    assert page.count(POLICY) == 1
    probed = page.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'").replace("<title>", f"{PROBE}<title>", 1)
    (folder / "page.html").write_text(probed, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(f'<body><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe></body>')
    run = browse(
        folder, frame, "--window-size=1300,1000", f"--blink-settings=preferredColorScheme={tone}", "--dump-dom"
    )
    found = re.search(r'data-seen="(.*?)"', run.stdout, re.DOTALL)
    assert found is not None, run.stdout[:2000]
    seen: dict = json.loads(html.unescape(found[1]))
    assert seen["width"] == width
    return seen | {"console": [line for line in run.stderr.splitlines() if ":CONSOLE:" in line]}


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / (3 * 255)


@pytest.mark.parametrize(("width", "tone"), [(1100, LIGHT), (420, DARK)])
def test_the_page_fits_and_asks_for_nothing(tmp_path, width, tone):
    seen = look(tmp_path, render([compression()]), width=width, tone=tone)
    assert seen["overflow"] == 0 and seen["wide"] == []
    assert seen["requests"] == [] and seen["console"] == []
    told = (
        "Before and after", "91.6% of 16,384 tokens", "4.51 MB", "nats a token", "--recipe gptq-4bit", "group_size: 32",
        "model.layers.7.mlp.down_proj", "int4, group 32", "transformers 5.23.0", "3f3f3f", "f.readlines()",
    )  # fmt: skip
    assert [part for part in told if part not in seen["text"]] == []
    assert (brightness(seen["ground"]) > 0.9) == (tone == LIGHT)
    assert (brightness(seen["ink"]) < 0.3) == (tone == LIGHT)
    assert seen["letters"] >= 9.5  # pixels, as drawn


def test_several_results_fit_too(tmp_path):
    page = render([compression(), compression(blocks=32, recipe="round-to-nearest-4bit", loss=1.9)])
    seen = look(tmp_path, page, width=420, tone=LIGHT)
    assert seen["overflow"] == 0 and seen["wide"] == []
    assert "2 results side by side" in seen["text"]
    assert seen["requests"] == [] and seen["console"] == []


def test_hostile_text_does_nothing(tmp_path):
    seen = look(tmp_path, render([hostile(EVIL)]), width=1100, tone=LIGHT)
    assert seen["title"] != "owned"
    assert seen["requests"] == [] and seen["console"] == []
    assert EVIL in seen["text"]
    assert seen["overflow"] == 0


def test_the_probe_would_have_seen_it(tmp_path):
    """The probe's own proof: a page that asks for a picture, or is too wide, or that runs a script, is caught."""
    bad = "<img src='picture.png'><script>document.title = 'owned'</script><div style='width:2000px'>x</div>"
    seen = look(tmp_path, render([compression()]).replace("<main>", "<main>" + bad), width=1100, tone=LIGHT)
    assert len(seen["requests"]) == 1 and "picture.png" in seen["console"][0]
    assert seen["overflow"] > 0 and seen["wide"]
    assert seen["title"] == "owned"


@pytest.mark.parametrize("tone", [LIGHT, DARK])
def test_a_picture_of_the_page_is_not_blank(tmp_path, tone):
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(render([compression()]), encoding="utf-8")
    browse(
        tmp_path,
        page,
        "--window-size=900,1200",
        f"--blink-settings=preferredColorScheme={tone}",
        f"--screenshot={picture}",
    )
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (900, 1200)
    assert len(data) > 30_000  # a blank page compresses to less
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]  # the header is whole
