"""The page and the plot: their figures are the JSON's, they need nothing from elsewhere, and a real browser draws
them.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lora_gguf import errors
from lora_gguf.report.content import MERGED_KINDS, Content, Table
from lora_gguf.report.page import page_of
from tests.browser import CHROMIUM, Browser
from tests.test_cli import leftovers, run
from tests.test_verify import SIZE, some_pairs, write_adapter, write_base

HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 2'>&amp;\u2028\"'`${1}"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and the text in its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self._open = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self._open = True

    def handle_endtag(self, _tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.texts[-1] += data

    def text_of(self, tag: str, **attributes) -> list[str]:
        """The text in the elements with these ``attributes``, up to the next tag."""
        return [
            text
            for (found, has), text in zip(self.elements, self.texts)
            if found == tag and attributes.items() <= has.items()
        ]


def data_of(path) -> dict:
    return json.loads(data_text(Page(path.read_text())))


def data_text(page: Page) -> str:
    (text,) = page.text_of("script", id="report")
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of three layers and an adapter."""
    folder = tmp_path_factory.mktemp("report")
    write_base(folder / "base.gguf", "Q4_0")
    write_adapter(folder / "adapter.gguf", some_pairs(SIZE["Q4_0"]))
    return folder


@pytest.fixture(scope="module")
def merged(folder):
    """The page of a merge and what ``--json`` printed with it."""
    import contextlib
    import io

    from lora_gguf.cli import execute

    words = ["merge", folder / "base.gguf", folder / "adapter.gguf", "-o", folder / "merged.gguf"]
    words += ["--report", folder / "page.html", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert execute([str(word) for word in words]) == 0
    return folder / "page.html", json.loads(out.getvalue())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_the_page_of_a_merge_has_the_figures_of_its_json(merged, folder):
    page, printed = merged
    data = data_of(page)
    assert data["report"] == printed and len(printed["merged"]) == 15
    assert data["figure"]["value"] == f"{printed['all']['kept']:.0%}" and data["figure"]["badge"] == "good"
    assert (
        data["run"]["command"].startswith(f"lora-gguf merge {folder}/base.gguf") and "--json" in data["run"]["command"]
    )
    sizes = {row["role"]: row["size"] for row in data["run"]["files"]}
    assert sizes == {"base": os.path.getsize(folder / "base.gguf"), "adapter": os.path.getsize(folder / "adapter.gguf"),
                     "output": os.path.getsize(folder / "merged.gguf")}  # fmt: skip
    assert all(row["outcome"] == "applied" for row in printed["accounts"]) and len(printed["accounts"]) == 30


def test_the_page_of_a_verification_has_the_figures_of_its_json(merged, folder, tmp_path, capsys):
    words = [folder / "merged.gguf", "--base", folder / "base.gguf", "--lora", f"{folder}/adapter.gguf:2"]
    code, out, err = run(capsys, "verify", *words, "--json", "--report", tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert code == errors.MismatchError.exit_code and "another scale" in err
    assert data["report"] == json.loads(out) and data["figure"]["bad"] and "another scale" in data["warnings"][0]


def test_kinds_add_up_to_their_tensors(merged):
    _, printed = merged
    for kind in printed["kinds"]:
        parts = [row for row in printed["merged"] if row["kind"] == kind["kind"]]
        energy = [row["delta_norm"] ** 2 for row in parts]
        assert kind["count"] == len(parts) == 3 and kind["delta_norm"] ** 2 == pytest.approx(sum(energy))
        assert kind["kept"] == pytest.approx(sum(row["kept"] * e for row, e in zip(parts, energy)) / sum(energy))


def test_a_dry_run_says_that_nothing_was_measured(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    code, out, _ = run(
        capsys, "merge", folder / "base.gguf", folder / "adapter.gguf", "--dry-run", "--json", "--report", page
    )
    data = data_of(page)
    assert code == 0 and data["report"] == json.loads(out) and data["report"]["all"]["kept"] is None
    assert "dry run" in data["figure"]["label"] and set(data["charts"]["maps"]) == {"type"}


def test_nothing_in_the_page_refers_elsewhere(merged):
    text = merged[0].read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background", "style"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "form")
    (style,) = page.text_of("style")
    assert "url(" not in style and "@import" not in style
    (allowed,) = (has["content"] for tag, has in page.elements if has.get("http-equiv") == "Content-Security-Policy")
    scripts = [text for (tag, has), text in zip(page.elements, page.texts) if tag == "script" and not has]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert (
        len(scripts) == 2
        and allowed == f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:"
    )


def hostile_content() -> Content:
    row = {"name": HOSTILE, "layer": None, "kind": HOSTILE, "type": "Q4_0", "base_type": "Q4_0", "kept": 0.5}
    account = {"tensor": HOSTILE, "outcome": "ignored", "target": HOSTILE, "reason": HOSTILE}
    report = {"merged": [row], "kinds": [row | {"count": 1}], "accounts": [account]}
    figure = {"value": HOSTILE, "label": HOSTILE, "bad": True}
    table = Table(HOSTILE, "kinds", MERGED_KINDS, {"kind": HOSTILE})
    return Content(
        HOSTILE, figure, [HOSTILE], [HOSTILE], report, "merged", ("kept", "type"), [table], [("base", HOSTILE)]
    )


def test_hostile_names_stay_text():
    content = hostile_content()
    page = Page(page_of(content, ["lora-gguf", HOSTILE]))
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 3 and not [
        tag for tag, _ in page.elements if tag == "img"
    ]
    assert json.loads(data_text(page))["report"] == content.report and data_text(page).isascii()


@in_browser
def test_hostile_names_stay_text_in_a_browser(tmp_path, browser):
    (tmp_path / "page.html").write_text(page_of(hostile_content(), ["lora-gguf", HOSTILE]))
    browser.open(tmp_path / "page.html")
    browser.value("document.querySelector('#accounts details').open = true")
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert browser.value("document.querySelector('#accounts .cards td').textContent") == HOSTILE
    assert browser.value("String(window.taken)") == "undefined" and browser.value("document.images.length") == 0


@in_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_it_and_asks_for_nothing(merged, browser, width, dark):
    page, printed = merged
    browser.events.clear()
    browser.open(page, width=width, dark=dark)
    assert browser.requests() == [page.as_uri()] and not browser.complaints()
    assert browser.value("document.documentElement.scrollWidth") <= width
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 300) == dark
    cells = browser.value(
        "[...document.querySelectorAll('#map .mark-rect path[aria-roledescription]')].map(cell => cell.ariaLabel)"
    )
    assert len(cells) == len(printed["merged"])
    for row in printed["merged"]:
        said = f"layer: {row['layer']}; ", f"tensor: {row['name']}; delta kept: {row['kept']:.3f}"
        assert any(all(part in cell for part in said) for cell in cells), row
    table = browser.value(
        "[...document.querySelectorAll('#kinds tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    expected = [[kind["kind"] + kind["type"], str(kind["count"]), f"{kind['kept']:.3f}"] for kind in printed["kinds"]]
    assert [row[:3] for row in table[:-1]] == expected and table[-1][2] == f"{printed['all']['kept']:.3f}"


@in_browser
def test_every_measure_can_be_chosen(merged, browser):
    browser.open(merged[0])
    for title in ("delta / step", "delta norm", "codes changed", "noise / delta", "type"):
        browser.value(
            f"[...document.querySelectorAll('#map button')].find(button => button.textContent === '{title}').click()"
        )
        browser.value("new Promise(done => setTimeout(done, 300))")
        assert title in browser.value("document.querySelector('#map .role-legend-title').textContent")
    assert not [found for found in browser.complaints() if found.get("level") == "error"]


@in_browser
def test_the_policy_keeps_even_a_script_of_the_page_from_the_network(merged, browser):
    text, asked = merged[0].read_text(), []
    pages = {"/page": text, "/open": re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for page, expected in (("/open", "sent"), ("/page", "kept")):
            browser.open(f"http://127.0.0.1:{server.server_port}{page}")
            assert browser.value("fetch('/asked').then(() => 'sent', () => 'kept')") == expected
        assert asked == ["/open", "/asked", "/page"]
        server.shutdown()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots(folder, tmp_path, capsys, suffix):
    plot = tmp_path / f"plot.{suffix}"
    code, _, err = run(
        capsys, "merge", folder / "base.gguf", folder / "adapter.gguf", "-o", tmp_path / "out.gguf", "--plot", plot
    )
    content = plot.read_bytes()
    assert code == 0 and str(plot) in err and not leftovers(tmp_path)
    if suffix == "png":
        assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") > 400
    else:
        assert all(text in content.decode() for text in ("attn_q", "ffn_down", "delta kept", "delta / step"))


def merge_words(folder, tmp_path, *more):
    return ["merge", folder / "base.gguf", folder / "adapter.gguf", "-o", tmp_path / "out.gguf", *more]


def test_an_existing_report_is_refused_before_the_merge(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    code, _, err = run(capsys, *merge_words(folder, tmp_path, "--report", page))
    assert code == errors.FileError.exit_code and "--force" in err
    assert os.listdir(tmp_path) == ["page.html"] and page.read_text() == "mine"
    assert (
        run(capsys, *merge_words(folder, tmp_path, "--report", page, "--force"))[0] == 0 and "<html" in page.read_text()
    )


@pytest.mark.parametrize(
    ("more", "code"), [
        (("--report", "{}/out.gguf"), 2), (("--plot", "{}/plot.bmp"), 2), (("--report", "{}/x.svg", "--plot", "{}/x.svg"), 2),
        (("--report", "{}/no/page.html"), 7), (("--report", "{}"), 7),
    ]
)  # fmt: skip
def test_reports_that_cannot_be(folder, tmp_path, capsys, more, code):
    assert run(capsys, *merge_words(folder, tmp_path, *(word.format(tmp_path) for word in more)))[0] == code
    assert not os.listdir(tmp_path)


def test_an_input_is_never_replaced(folder, tmp_path, capsys):
    before = (folder / "adapter.gguf").read_bytes()
    code, _, err = run(capsys, *merge_words(folder, tmp_path, "--report", folder / "adapter.gguf", "--force"))
    assert code == errors.FileError.exit_code and "input" in err and (folder / "adapter.gguf").read_bytes() == before


def test_nor_an_output_that_the_merge_named_itself(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "merge", folder / "base.gguf", folder / "adapter.gguf")[0] == 0
    (name,) = os.listdir(tmp_path)
    code, _, _ = run(capsys, "merge", folder / "base.gguf", folder / "adapter.gguf", "--report", name, "--force")
    assert code == errors.FileError.exit_code and (tmp_path / name).read_bytes().startswith(b"GGUF")


def test_a_report_that_fails_leaves_the_merged_file(folder, merged, tmp_path, capsys, monkeypatch):
    pwrite = os.pwrite

    def full(fd, data, position):
        if bytes(data[:9]) == b"<!doctype":
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    code, out, err = run(capsys, *merge_words(folder, tmp_path, "--report", tmp_path / "page.html"))
    assert code == errors.FileError.exit_code and "page.html: cannot write" in err and "kept" in out
    assert (
        os.listdir(tmp_path) == ["out.gguf"]
        and (tmp_path / "out.gguf").stat().st_size == (folder / "merged.gguf").stat().st_size
    )


def test_without_the_extra_one_line_names_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    code, _, err = run(capsys, *merge_words(folder, tmp_path, "--report", tmp_path / "page.html"))
    assert code == errors.UnsupportedError.exit_code and "pip install vl-convert-python" in err and err.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_the_page_of_a_checkup_has_the_figures_of_its_json(folder, tmp_path, capsys):
    page, plot = tmp_path / "page.html", tmp_path / "plot.png"
    words = ["doctor", folder / "base.gguf", folder / "adapter.gguf", "--json", "--report", page, "--plot", plot]
    code, out, _ = run(capsys, *words)
    data, printed = data_of(page), json.loads(out)
    assert code == 0 and data["report"] == printed and len(printed["tensors"]) == 15
    assert data["figure"]["value"] == f"{printed['outlooks'][0]['kept']:.0%}" and plot.read_bytes().startswith(
        b"\x89PNG"
    )
    assert {"delta_per_step", "kept.auto", "kept.nearest", "type"} <= set(data["charts"]["maps"])


@in_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_a_checkup(folder, tmp_path, capsys, browser, width):
    assert (
        run(capsys, "doctor", folder / "base.gguf", folder / "adapter.gguf", "--report", tmp_path / "page.html")[0] == 0
    )
    browser.events.clear()
    browser.open(tmp_path / "page.html", width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width and not browser.complaints()
    browser.value(
        "[...document.querySelectorAll('#map button')].find(button => button.textContent === 'delta kept, nearest').click()"
    )
    browser.value("new Promise(done => setTimeout(done, 300))")
    cells = browser.value(
        "[...document.querySelectorAll('#map .mark-rect path[aria-roledescription]')].map(cell => cell.ariaLabel)"
    )
    for row in data_of(tmp_path / "page.html")["report"]["tensors"]:
        assert any(
            row["name"] in cell and f"delta kept, nearest: {row['kept']['nearest']:.3f}" in cell for cell in cells
        ), row
    cells = "[...document.querySelectorAll('#map .mark-rect path[aria-roledescription]')]"
    fills = browser.value(f"new Set({cells}.map(c => c.getAttribute('fill'))).size")
    assert fills > 1


def test_a_refusal_has_its_page_and_no_plot(folder, tmp_path, capsys):
    names = {"blk.0.attn_q.weight": (128, 512)}
    adapter = write_adapter(tmp_path / "wide.gguf", some_pairs(1e-3, names=names))
    page, plot = tmp_path / "page.html", tmp_path / "plot.png"
    code, _, err = run(capsys, "doctor", folder / "base.gguf", adapter, "--report", page, "--plot", plot)
    data = data_of(page)
    assert code == errors.MismatchError.exit_code and data["figure"]["value"] == "refused" and not plot.exists()
    assert data["figure"]["label"] in err and not data["charts"]["maps"]


def test_a_file_of_the_hubs_cache_is_called_by_its_repository():
    from lora_gguf.report.content import file_name

    commit = "0123456789abcdef" * 2 + "01234567"
    folder = f"/home/me/.cache/huggingface/hub/models--alice--pirate-lora/snapshots/{commit}"
    assert file_name(folder) == "alice/pirate-lora@0123456789ab"
    assert file_name(f"{folder}/a/b.gguf") == "alice/pirate-lora@0123456789ab/a/b.gguf"
    assert file_name("/models/b.gguf") == "/models/b.gguf"


@in_browser
def test_the_page_tells_what_now_and_folds_what_is_not_asked(merged, browser):
    page, printed = merged
    browser.open(page)
    assert browser.value("document.querySelector('#badge').textContent") == "good"
    what_now = browser.value("document.querySelector('#next pre').textContent")
    assert "llama-cli -m" in what_now and "lora-gguf verify" in what_now
    assert browser.value("[...document.querySelectorAll('table')].every(table => table.offsetWidth <= 800)")
    drawn = "document.querySelectorAll('#histograms svg').length"
    assert browser.value(drawn) == 1
    browser.value("document.querySelector('#histograms details').open = true")
    browser.value("new Promise(done => setTimeout(done, 500))")
    assert browser.value(drawn) == len(data_of(page)["charts"]["histograms"])
    groups = browser.value("[...document.querySelectorAll('#accounts table')[0].tBodies[0].rows].length")
    assert groups == len({row["kind"] for row in printed["merged"]})
