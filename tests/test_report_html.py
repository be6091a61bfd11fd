"""The page: one file, no network, valid data; and, in a browser, that it works."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from report_cases import DENSE, FILTERED, NODE

from cef_compile.policy import Decision
from cef_compile.report import Audit, Report, Table, TileMap, write_html
from cef_compile.report.record import MEANS, RecordError, check, join
from cef_compile.report.saved import read, write_page

VOID = {"meta", "link", "img", "input", "br"}
HOSTILE = "</script><img src=x onerror=alert(1)>&{{style}}"
ENVIRONMENT = {
    "versions": {"torch": "2.13.0", "triton": None},
    "python": "3.11",
    "platform": "Linux",
    "cpu": {"cores": 2, "torch_threads": 1},
    "cuda": {
        "built_for": "13.0",
        "devices": [{"name": "NVIDIA H100", "memory_gib": 79.1, "capability": "9.0"}],
    },
}


def png(colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def generation(nodes: int = 3, steps: int = 4) -> Audit:
    """Two branches of some steps; later nodes keep more and get less."""
    audit = Audit()
    for step in range(steps):
        for branch in ("text", "no text"):
            audit.label(step, branch)
            for i in range(nodes):
                density, recall = 0.2 + 0.2 * i + 0.02 * step, 0.95 - 0.05 * i
                error = 0.01 + 0.03 * i
                measures = torch.tensor([density, recall, recall, 0.01, -6.0, error, 0.001])
                node = replace(NODE, path=f"blocks.{i}.attn1")
                audit.add("Wan", node, Decision(0.9), measures)
    return audit


def report(nodes: int = 3) -> Report:
    filtered = [replace(FILTERED, path=f"blocks.{i}.attn1", ordinal=0) for i in range(nodes)]
    return Report("Balanced(recall=0.9)", [*filtered, DENSE], ["oops.*"])


def tile_map() -> TileMap:
    kept = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    return TileMap.of("Wan", "blocks.2.attn1", 0, kept, torch.ones(1, 32, dtype=torch.bool))


def full_page(path: Path, **changes: Any) -> str:
    options = {
        "title": "Two <branches> & a title",
        "frames": {"dense": png("red"), "filtered": png("blue")},
        "tables": [Table("Quality", ["against", "PSNR"], [["dense", "40.0"]], "A note.")],
        "tile_maps": [tile_map()],
        "environment": ENVIRONMENT,
    }
    write_html(path, report(), generation(), **{**options, **changes})
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a page holds, and whether its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag, attributes in self.open:
            name = attributes.get("id") or tag
            self.texts[name] = self.texts.get(name, "") + data

    @property
    def data(self) -> Any:
        return json.loads(self.texts["data"])


class TestStructure:
    def test_is_one_file(self, tmp_path: Path) -> None:
        text = full_page(tmp_path / "report.html")
        page = Page(text)
        for _, attributes in page.elements:
            for name in ("src", "href", "action", "srcset", "data"):
                assert (attributes.get(name) or "data:").startswith("data:")
        addresses = set(re.findall(r"\w+://[^\"' ]+", text))
        assert addresses == {"http://www.w3.org/2000/svg"}  # a name that nobody fetches
        assert "@import" not in text
        assert "url(" not in text
        assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]

    def test_data_are_those_of_the_audit(self, tmp_path: Path) -> None:
        data = Page(full_page(tmp_path / "report.html")).data
        audit = generation()
        assert data["passes"] == audit.to_dict()["passes"]
        for found, node in zip(data["nodes"], audit.nodes, strict=True):
            assert found["name"] == f"{node.path}#0"
            assert found["recalls"] == list(node.recalls)
            assert found["densities"] == list(node.densities)
            assert found["errors"] == list(node.errors)
            assert found["passes"] == list(node.passes)
        (found,) = data["tileMaps"]
        mean = found["panels"][0]
        assert len(base64.b64decode(mean["cells"])) == mean["rows"] * mean["columns"] == 16 * 32

    def test_words_and_tables(self, tmp_path: Path) -> None:
        page = Page(full_page(tmp_path / "report.html"))
        header, table = page.texts["header"], page.texts["node-table"]
        assert page.texts["h1"] == page.texts["title"] == "Two <branches> & a title"
        assert "Of 4 attention nodes 3 are filtered. Policy: Balanced(recall=0.9)." in header
        assert "Dense: cross attention to a short context (1)." in header
        assert "Rules of the policy that match no node: 'oops.*'." in header
        assert "Over 8 forward passes the filtered nodes computed 43.0 %" in header
        assert "carried 90.0 % of the attention energy: at the target of 90.0 %" in header
        assert "furthest from it is blocks.2.attn1#0 with 85.0 %" in header
        assert "their output was off by 4.0 % of its size in the mean" in header
        assert "most in blocks.2.attn1#0: 7.0 % (95 % interval 6.9 to 7.1 %)" in header
        assert "Nodes of a group share one threshold" in header
        assert "dense: cross attention to a short context (77 keys)" in table
        assert "A note." in page.texts["main"]
        assert "NVIDIA H100, 79.1 GiB, compute capability 9.0" in page.texts["main"]
        pictures = [a["src"] for tag, a in page.elements if tag == "img"]
        expected = [base64.b64encode(png(c)).decode() for c in ("red", "blue")]
        assert pictures == [f"data:image/png;base64,{data}" for data in expected]

    def test_text_of_the_user_stays_text(self, tmp_path: Path) -> None:
        node = replace(FILTERED, path=HOSTILE)
        audit = Audit()
        audit.label(HOSTILE, HOSTILE)
        audit.add("Wan", replace(NODE, path=HOSTILE), Decision(0.9), torch.full((8,), 0.5))
        path = write_html(
            tmp_path / "report.html",
            Report(HOSTILE, [node]),
            audit,
            title=HOSTILE,
            frames={HOSTILE: png("red")},
            tables=[Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)],
        )
        page = Page(path.read_text(encoding="utf-8"))
        assert [tag for tag, _ in page.elements].count("img") == 1
        assert [tag for tag, _ in page.elements].count("script") == 2
        assert page.data["nodes"][0]["path"] == HOSTILE
        assert page.texts["title"] == HOSTILE

    def test_without_an_audit_it_says_so(self, tmp_path: Path) -> None:
        page = Page(write_html(tmp_path / "a.html", report()).read_text(encoding="utf-8"))
        assert "the achieved recall is not known" in page.texts["header"]
        assert page.data == {"passes": [], "nodes": [], "tileMaps": []}

    def test_bounds_are_named(self, tmp_path: Path) -> None:
        bounded = replace(FILTERED, filter="online", bound=True)
        path = write_html(tmp_path / "a.html", Report("p", [bounded, FILTERED]))
        page = Page(path.read_text(encoding="utf-8"))
        assert "1 filtered with bound=True" in page.texts["header"]
        assert "filtered (online, bound, triton)" in page.texts["node-table"]
        assert "filtered (planned, triton)" in page.texts["node-table"]

    def test_without_a_node(self, tmp_path: Path) -> None:
        page = Page(write_html(tmp_path / "a.html", Report("p", [])).read_text(encoding="utf-8"))
        assert "No attention node was seen" in page.texts["header"]

    def test_all_dense(self, tmp_path: Path) -> None:
        path = write_html(tmp_path / "a.html", Report("p", [DENSE]), Audit())
        page = Page(path.read_text(encoding="utf-8"))
        assert "Of 1 attention nodes 0 are filtered" in page.texts["header"]

    def test_two_models_are_named(self, tmp_path: Path) -> None:
        nodes = [replace(FILTERED, model=name) for name in ("Wan 1", "Wan 2")]
        path = write_html(tmp_path / "a.html", Report("p", nodes))
        table = Page(path.read_text(encoding="utf-8")).texts["node-table"]
        assert "Wan 1: blocks.0.attn1#0" in table
        assert "Wan 2: blocks.0.attn1#0" in table

    def test_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        page = Page(write_html(tmp_path / "a.html", *not_finite()).read_text(encoding="utf-8"))
        assert "1 filtered node has no recall: NaN or infinity" in page.texts["header"]
        assert page.data["nodes"][0]["errors"] == [pytest.approx(0.01), None]
        record = json.loads(json.dumps(join(*(thing.to_dict() for thing in not_finite()))))
        assert check(record)["mean"] == {"recall": None, "error": None, "density": 0.5}

    def test_errors_come_before_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.html"
        with pytest.raises(ValueError, match=r"picture 'x' must be PNG.*begins with b'hello'"):
            full_page(path, frames={"x": b"hello"})
        with pytest.raises(ValueError, match="'T' has 1 columns, but a row has 2 cells"):
            full_page(path, tables=[Table("T", ["a"], [["1", "2"]])])
        assert not path.exists()


def not_finite() -> tuple[Report, Audit]:
    """Two calls of a node whose numbers are not finite in the second."""
    audit = Audit()
    node = replace(NODE, path=FILTERED.path)
    for recall, error in ((0.9, 0.01), (math.nan, math.inf)):
        measures = torch.tensor([0.5, recall, recall, 0.01, -6.0, error, 0.001])
        audit.add("Wan", node, Decision(0.9), measures)
    return Report("p", [FILTERED]), audit


class TestSaved:
    def record(self) -> dict[str, Any]:
        joined = join(report().to_dict(), generation().to_dict())
        page = {
            "title": "Saved",
            "tables": [{"title": "T", "header": ["a"], "rows": [["1"]], "note": ""}],
            "frames": {"both": "frames.png"},
        }
        maps = [tile_map().to_dict()]
        return {**joined, "page": page, "tile_maps": maps, "environment": ENVIRONMENT}

    def test_the_page_of_a_file_is_that_of_the_objects(self, tmp_path: Path) -> None:
        (tmp_path / "frames.png").write_bytes(png("red"))
        source = tmp_path / "report.json"
        source.write_text(json.dumps(self.record(), allow_nan=False))
        write_page(source, tmp_path / "saved.html")
        made = full_page(
            tmp_path / "made.html",
            title="Saved",
            tables=[Table("T", ["a"], [["1"]])],
            frames={"both": png("red")},
        )
        assert (tmp_path / "saved.html").read_text(encoding="utf-8") == made

    def test_a_plain_report_is_enough(self, tmp_path: Path) -> None:
        source = tmp_path / "report.json"
        source.write_text(json.dumps(report().to_dict()))
        write_page(source, tmp_path / "report.html")
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert "Of 4 attention nodes 3 are filtered" in page.texts["header"]

    def test_an_audit_is_joined_with_its_newest_node(self) -> None:
        small, large = (replace(FILTERED, q_shape=(1, 1, n, 8)) for n in (512, 1024))
        data = {**dict.fromkeys(MEANS, 0.5), "passes": [], "nodes": [{"model": "Wan"}]}
        data["nodes"][0] |= {"path": FILTERED.path, "ordinal": FILTERED.ordinal}
        joined = join(Report("p", [small, large, DENSE]).to_dict(), data)
        assert [node["audit"] is not None for node in joined["nodes"]] == [False, True, False]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda r: r.pop("nodes"), "the file has no 'nodes'"),
            (lambda r: r.update(nodes=3), "the file.nodes must be list, got 3"),
            (lambda r: r["nodes"].insert(1, 7), r"nodes\[1\] must be a JSON object, got int"),
            (lambda r: r["nodes"][1].pop("kind"), r"nodes\[1\] has no 'kind'"),
            (lambda r: r["nodes"][0].update(recall="x"), r"nodes\[0\].recall must be .* got 'x'"),
            (lambda r: r["nodes"][0]["audit"].pop("target"), r"nodes\[0\].audit has no 'target'"),
            (lambda r: r["nodes"][0]["audit"]["recalls"].pop(), "errors must have 7 numbers"),
            (lambda r: r["nodes"][0]["audit"]["passes"].pop(), "8 indices below 8"),
            (lambda r: r["passes"].clear(), "8 indices below 0"),
            (lambda r: r["nodes"][0]["audit"].update(interval=[0.1]), "must have 2 numbers"),
            (lambda r: r["nodes"][0]["audit"].pop("error"), r"nodes\[0\].audit has no 'error'"),
            (lambda r: r["nodes"][0]["audit"]["errors"].pop(), "errors must have 8 numbers"),
            (
                lambda r: r["nodes"][0]["audit"]["recalls"].__setitem__(2, "x"),
                r"recalls\[2\] must be a number or null, got 'x'",
            ),
            (lambda r: r["passes"][0].pop("step"), r"passes\[0\] has no 'step'"),
            (lambda r: r.update(page=1), "page must be dict, got 1"),
            (lambda r: r["page"]["tables"][0].pop("note"), r"tables\[0\] has no 'note'"),
            (lambda r: r["tile_maps"][0]["panels"][0].pop("cells"), r"panels\[0\] has no 'cells'"),
            (lambda r: r.update(mean=0.9), "mean must be a JSON object, got float"),
        ],
    )
    def test_damage_is_named(self, damage: Any, message: str) -> None:
        record = json.loads(json.dumps(self.record()))
        damage(record)
        with pytest.raises(RecordError, match=message):
            check(record)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"cannot read .*: No such file"):
            read(tmp_path / "report.json")
        (tmp_path / "a").write_text('{"nodes": ]')
        with pytest.raises(RecordError, match=r"is not JSON: .* at line 1, column 11"):
            read(tmp_path / "a")
        (tmp_path / "a").write_bytes(b"\xff\xfe")
        with pytest.raises(RecordError, match="not UTF-8 text"):
            read(tmp_path / "a")
        (tmp_path / "a").write_text("[]")
        with pytest.raises(RecordError, match="the file must be a JSON object, got list"):
            read(tmp_path / "a")

    def test_missing_pictures_and_folders(self, tmp_path: Path) -> None:
        source = tmp_path / "report.json"
        source.write_text(json.dumps(self.record()))
        with pytest.raises(RecordError, match=r"cannot read .*frames.png: No such file"):
            write_page(source, tmp_path / "a.html")
        (tmp_path / "frames.png").write_bytes(png("red"))
        with pytest.raises(RecordError, match=r"cannot write .*a.html: No such file"):
            write_page(source, tmp_path / "missing" / "a.html")
        record = self.record()
        record["environment"] = {k: v for k, v in ENVIRONMENT.items() if k != "cuda"}
        source.write_text(json.dumps(record))
        with pytest.raises(RecordError, match="environment has no 'cuda'"):
            write_page(source, tmp_path / "a.html")


PROBE = """
<script>
(() => {
  const rows = () => [...document.querySelectorAll("#node-table tbody tr")];
  const names = () => rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
  const click = (name) => [...document.querySelectorAll("#node-table th button")]
    .find((button) => button.textContent === name).click();
  const type = (id, value, event) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event(event));
  };
  const found = { errors: window.seen, first: names() };
  click("density"); found.rising = names();
  click("density"); found.falling = names();
  click("node"); found.byName = names();
  click("error"); click("error"); found.byError = names();
  click("node");
  type("find", "short CROSS", "input"); found.words = names();
  found.shown = document.getElementById("shown").textContent;
  type("find", "", "input"); type("show", "filtered", "change"); found.filtered = names();
  type("show", "", "change"); found.all = names();
  found.visible = [...document.querySelectorAll("section[id]")]
    .filter((section) => section.offsetHeight > 0).map((section) => section.id);
  found.cells = [...document.querySelectorAll("#heat-maps svg")]
    .map((svg) => svg.querySelectorAll("rect title").length);
  found.headings = [...document.querySelectorAll("#heat-maps h3")].map((h) => h.textContent);
  found.bars = [...document.querySelectorAll("#histograms svg")].map((svg) =>
    [...svg.querySelectorAll("rect title")]
      .reduce((sum, title) => sum + Number(title.textContent.match(/: (\\d+)/)[1]), 0));
  found.worst = [...document.querySelectorAll("#worst-nodes code")].map((c) => c.textContent);
  found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  found.shades = [...document.querySelectorAll("canvas")].map((canvas) => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(Array.from({ length: pixels.length / 4 }, (_, i) => pixels[4 * i])).size;
  });
  found.images = [...document.images].map((image) => [image.complete, image.naturalWidth]);
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>
</body>"""
WATCH = """<script>
window.seen = [];
window.addEventListener("error", (event) => window.seen.push(String(event.message)));
</script>
</head>"""


def probe(folder: Path, text: str, width: int = 1300) -> dict[str, Any]:
    """What a script finds that uses the page in headless Chromium."""
    page = folder / "probed.html"
    page.write_text(text.replace("</head>", WATCH, 1).replace("</body>", PROBE), encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking"
        " --disable-component-update --disable-sync --no-first-run --enable-logging=stderr"
        f" --window-size={width},900 --user-data-dir={folder / 'profile'} --dump-dom"
    )
    run = subprocess.run(
        ["chromium", *options.split(), page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in run.stderr, run.stderr
    (result,) = re.findall(r'<pre id="probe">(.*?)</pre>', run.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(result))
    assert found["errors"] == []
    assert not found["wide"], "the page is wider than its window"
    return found


@pytest.mark.browser
class TestBrowser:
    def test_everything_works(self, tmp_path: Path) -> None:
        found = probe(tmp_path, full_page(tmp_path / "report.html"))
        blocks = [f"blocks.{i}.attn1#0" for i in range(3)]
        cross = "blocks.0.attn2#1"
        assert found["first"] == [*blocks, cross]
        assert found["rising"] == [*blocks, cross]
        assert found["falling"] == [*reversed(blocks), cross]  # without a number: last
        assert found["byName"] == [blocks[0], cross, *blocks[1:]]
        assert found["byError"] == [*reversed(blocks), cross]
        assert found["words"] == [cross]
        assert found["shown"] == "1 of 4 nodes"
        assert found["filtered"] == blocks
        assert sorted(found["all"]) == sorted([*blocks, cross])
        assert found["visible"] == ["nodes", "heat", "distributions", "worst", "tiles"]
        assert found["headings"] == ["text", "no text"]
        assert found["cells"] == [3 * 4] * 6
        assert found["bars"] == [3 * 8] * 3
        assert found["worst"] == blocks[::-1]
        assert len(found["shades"]) == 4
        assert found["shades"][0] == 4  # of three heads, 0 to 3 keep a pair
        assert found["shades"][1:] == [2, 2, 2]
        assert found["images"] == [[True, 8], [True, 8]]

    def test_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        path = write_html(tmp_path / "a.html", *not_finite())
        found = probe(tmp_path, path.read_text(encoding="utf-8"))
        assert found["cells"] == [2, 2, 2]
        assert found["bars"] == [2, 1, 1]

    def test_a_phone(self, tmp_path: Path) -> None:
        probe(tmp_path, full_page(tmp_path / "report.html"), width=500)

    def test_little_and_nothing(self, tmp_path: Path) -> None:
        for i, (nodes, audit) in enumerate([([], None), ([DENSE], Audit()), ([FILTERED], None)]):
            path = write_html(tmp_path / f"{i}.html", Report("p", nodes), audit)
            found = probe(tmp_path, path.read_text(encoding="utf-8"))
            assert found["visible"] == ["nodes"]
            assert len(found["all"]) == len(nodes)

    def test_one_call_without_labels(self, tmp_path: Path) -> None:
        audit = Audit()
        node = replace(NODE, path=FILTERED.path)
        audit.add("Wan", node, Decision(0.9), torch.tensor([1.0, 1.0, 1.0, 0.0, -6.0, 0.0, 0.0]))
        path = write_html(tmp_path / "a.html", Report("p", [FILTERED]), audit)
        found = probe(tmp_path, path.read_text(encoding="utf-8"))
        assert found["cells"] == [1, 1, 1]
        assert found["headings"] == []
