"""The picture of a lineage: it says what the lineage says, and a visitor finds the facts in it."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import networkx
import pytest
from test_report import browser, visited, with_script

from flows.audit import Audit
from flows.findings import Finding
from flows.lineage import Lineage, Stage
from flows.picture import HEIGHT, Node, as_page, as_svg, draw

CODE = {"stages/train.py": "c0de"}
READ = {
    "prepare": ["data/reviews.json", "data/base"],
    "sft": ["prompts", "data/base"],
    "label": ["prompts", "models/sft"],
    "train@dpo": ["models/sft", "pairs"],
    "train@ipo": ["models/sft", "pairs"],
    "judge@dpo": ["prompts", "models/dpo"],
    "judge@ipo": ["prompts", "models/ipo"],
    "compare": ["judgements"],
    "apart": ["data/apart"],
    "alone": [],
}
MADE = {
    "prepare": ["prompts"],
    "sft": ["models/sft"],
    "label": ["pairs", "completions"],
    "train@dpo": ["models/dpo"],
    "train@ipo": ["models/ipo"],
    "judge@dpo": ["judgements/dpo"],
    "judge@ipo": ["judgements/ipo"],
    "compare": ["comparison.json"],
    "apart": ["apart"],
    "alone": ["alone"],
}


def finding(artefact: str, severity: str = "failed", found: str = "another") -> Finding:
    return Finding(severity, "bytes", artefact, "one", found, "mend it")  # pyright: ignore


def audited(*findings: Finding) -> Audit:
    stages = {
        name: Stage(
            name,
            f"python -m stages.{name.partition('@')[0]}",
            {"params.yaml:beta": 0.1},
            {path: f"digest of {path}" for path in read} | (CODE if "train" in name else {}),
            {path: f"digest of {path}" for path in MADE[name]},
        )
        for name, read in READ.items()
    }
    lineage = Lineage(stages)
    return Audit("", "c0ffee", "", "", list(stages), lineage, list(findings), 9)


def test_arrows_say_what_came_of_what_and_no_more_often_than_needed() -> None:
    picture = draw(audited())
    assert {node.name for node in picture.nodes} == {
        *READ, "data/reviews.json", "data/base", "data/apart",
    }  # fmt: skip
    drawn = networkx.DiGraph([(arrow.source, arrow.target) for arrow in picture.arrows])
    whole = networkx.DiGraph([(need, node.name) for node in picture.nodes for need in node.needs])
    assert ("prepare", "judge@dpo") in whole.edges
    assert set(networkx.transitive_closure(drawn).edges) == set(
        networkx.transitive_closure(whole).edges
    )
    assert set(drawn.edges) == set(networkx.transitive_reduction(whole).edges)


def test_boxes_lie_apart_and_within_and_arrows_go_to_the_right() -> None:
    picture = draw(audited())

    def box(node: Node) -> tuple[float, float, float, float]:
        (x, y), half = node.place, node.width / 2
        return x - half, y - HEIGHT / 2, x + half, y + HEIGHT / 2

    boxes = {node.name: box(node) for node in picture.nodes}
    for name, (left, top, right, bottom) in boxes.items():
        assert left >= 0 <= top
        assert right <= picture.width
        assert bottom <= picture.height
        for other, (x0, y0, x1, y1) in boxes.items():
            assert name == other or right <= x0 or x1 <= left or bottom <= y0 or y1 <= top
    for arrow in picture.arrows:
        assert boxes[arrow.source][2] < boxes[arrow.target][0]
        ordinates = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", arrow.path)]
        assert 0 <= min(ordinates) <= max(ordinates) <= picture.height


def test_a_lineage_is_always_drawn_the_same() -> None:
    drawn: set[str] = set()
    kept: list[object] = []
    for number in range(5):
        kept += [object() for _ in range(97 * number)]  # Other addresses, so other orders of sets.
        drawn.add(as_svg(audited()))
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("artefact", "nodes"),
    [
        ("models/dpo/model.safetensors", ["train@dpo"]),
        ("models/dpo", ["train@dpo"]),
        ("train@dpo (MLflow run 0123)", ["train@dpo"]),
        ("provenance/label.intoto.json", ["label"]),
        ("data/base/model.safetensors", ["data/base"]),
        ("stages/train.py", ["train@dpo", "train@ipo"]),
        ("models", []),
        ("dvc.lock", []),
    ],
)
def test_a_finding_is_told_at_the_nodes_that_it_is_about(artefact: str, nodes: list[str]) -> None:
    picture = draw(audited(finding(artefact)))
    assert [node.name for node in picture.nodes if node.state == "failed"] == nodes
    assert [node.name for node in picture.nodes if node.findings] == nodes


def test_the_gravest_finding_colours_a_node() -> None:
    found = [finding("models/dpo", "note"), finding("models/dpo", "unknown")]
    states = {node.name: node.state for node in draw(audited(*found)).nodes}
    assert (states["train@dpo"], states["train@ipo"]) == ("unknown", "sound")
    states = {node.name: node.state for node in draw(audited(*found, finding("models/dpo"))).nodes}
    assert states["train@dpo"] == "failed"


def test_the_svg_stands_alone() -> None:
    tree = ElementTree.fromstring(as_svg(audited(finding("models/dpo"))))
    space = "{http://www.w3.org/2000/svg}"
    assert tree.find(f"{space}style") is not None
    assert tree.find(f".//{space}a") is None
    texts = [text.text for text in tree.iter(f"{space}text")]
    assert sorted(map(str, texts)) == sorted(
        {*READ, "data/reviews.json", "data/base", "data/apart"}
    )
    (failed,) = (g for g in tree.iter(f"{space}g") if "failed" in g.attrib["class"])
    assert str(failed[0].text).startswith("train@dpo ")
    assert "models/dpo: bytes: expected one, got another; mend it" in str(failed[0].text)


class Links(HTMLParser):
    """Anchors, links, and all else that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.other: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.other += [found["src"]] if "src" in found else []


def test_the_page_asks_no_network_and_its_links_lead_to_facts() -> None:
    page = as_page(audited(finding("models/dpo", found="<script>alert(1)</script>")))
    found = Links(page)
    assert found.other == []
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids)) == len(READ) + 3 + 1
    assert re.findall('https?://[^" ]*', page) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in page
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") == 3  # In the list, the facts and the picture.
    assert "python -m stages.train" in page
    assert "beta = 0.1" in page


VISITOR = """
const all = (selector) => [...document.querySelectorAll(selector)];
const svg = document.querySelector("svg.lineage");
const shown = () => all("article.facts:not([hidden])").map((one) => one.dataset.node);
const lit = () => all(".arrow.lit").map((one) => [one.dataset.from, one.dataset.to]);
const view = () => svg.getAttribute("viewBox").split(" ").map(Number);
const link = (name) => svg.querySelector(`a[data-node="${name}"]`);
const press = (kind, x, y, target) => target.dispatchEvent(new PointerEvent(kind,
  { clientX: x, clientY: y, bubbles: true, cancelable: true }));
const seen = { first: shown(), views: [view()] };
link("label").dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
seen.clicked = [shown(), lit()];
const box = svg.getBoundingClientRect();
const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
svg.dispatchEvent(new WheelEvent("wheel",
  { deltaY: -300, clientX: x, clientY: y, bubbles: true, cancelable: true }));
seen.views.push(view());
press("pointerdown", x, y, svg);
press("pointermove", x + 60, y, svg);
press("pointerup", x + 60, y, svg);
link("sft").dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
seen.dragged = shown();
seen.views.push(view());
const [nearer, farther, whole] = all(".zoom button");
for (const button of [nearer, farther, whole]) { button.click(); seen.views.push(view()); }
const red = getComputedStyle(svg.querySelector(".failed rect"));
const plain = getComputedStyle(svg.querySelector(".node.sound rect"));
seen.colours = [red.stroke, plain.stroke, red.fill];
seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
const told = document.createElement("pre");
told.id = "seen";
told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
document.body.append(told);
"""


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_visitor_zooms_moves_and_is_told_the_facts_of_a_node(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(with_script(as_page(audited(finding("models/dpo"))), VISITOR))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom, console = visited(path, *dark)
    assert console == []
    (told,) = re.findall('<pre id="seen">([^<]*)</pre>', dom)
    seen = json.loads(base64.b64decode(told))
    assert seen["dark"] == (scheme == "dark")
    assert seen["first"] == ["train@dpo"]  # What failed.
    assert seen["clicked"] == [
        ["label"], [["sft", "label"], ["label", "train@dpo"], ["label", "train@ipo"]],
    ]  # fmt: skip
    assert seen["dragged"] == ["label"]  # A drag that ends on a node is no click.
    whole, near, moved, nearer, farther, again = seen["views"]
    assert near[2] < whole[2]
    assert near[2] == moved[2]
    assert moved[0] < near[0]
    assert nearer[2] < moved[2]
    assert farther[2] == pytest.approx(moved[2])
    assert again == whole
    failed, sound, fill = seen["colours"]
    assert len({failed, sound, fill}) == 3


@browser
def test_without_scripts_all_facts_are_there_to_read(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page = as_page(audited(finding("models/dpo")))
    path.write_text(re.sub("script-src 'sha256-[^']*'", "script-src 'none'", page))
    dom, _ = visited(path)
    assert "hidden" not in re.sub("<style>.*?</style>|<script>.*?</script>", "", dom, flags=re.S)
    assert dom.count("<article") == len(READ) + 3
