"""The lineage as a picture: where each stage and each source of data stands, and what is wrong.

An arrow that others imply is left out, so that a person sees the order; the facts of a node name
all that was read. Sugiyama's method by `grandalf`, from left to right.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from flows.audit import Audit
from flows.findings import EXIT_CODES, SHORT, Finding
from flows.lineage import Lineage
from flows.pages import HERE, render
from flows.statements import FOLDER, SUFFIX

STYLES = (HERE.parent / "stages/report.css", HERE / "lineage.css")
CHARACTER = 7.2  # width of one, in the units of the picture
HEIGHT = 30.0
PADDING = 12.0
RANK_GAP = 56.0
NODE_GAP = 12.0
MARGIN = 16.0
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Node:
    """A stage, or data that no stage made.

    Args:
        name: of the stage, or path of the data.
        digest: of the stage's lineage, or of the data.
        needs: nodes whose outputs it read.
        findings: of an audit, that are about it.
        place: of its centre.
        width: of its box.
    """

    name: str
    is_stage: bool
    digest: str
    needs: list[str]
    findings: list[Finding]
    place: tuple[float, float]
    width: float

    @property
    def anchor(self) -> str:
        return "node-" + "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def state(self) -> str:
        """The gravest that was found of it."""
        grave = [each.severity for each in self.findings if each.severity != "note"]
        return "failed" if "failed" in grave else "unknown" if grave else "sound"

    @property
    def short(self) -> str:
        return self.digest[:SHORT]


@dataclass(frozen=True)
class Arrow:
    source: str
    target: str
    path: str  # SVG's


@dataclass(frozen=True)
class Picture:
    nodes: list[Node]
    arrows: list[Arrow]
    width: float
    height: float


def draw(found: Audit) -> Picture:
    """Lay out what an audit walked through."""
    lineage, stages = found.lineage, found.stages
    data = {path: digest for name in stages for path, digest in lineage.data_of(name).items()}
    needs = {path: [] for path in data} | {
        name: [*lineage.data_of(name), *(n for n in lineage.needs_of(name) if n in stages)]
        for name in stages
    }
    about: dict[str, list[Finding]] = {name: [] for name in needs}
    for finding in found.findings:
        for name in _concerned(finding, lineage):
            if name in needs:
                about[name].append(finding)
    widths = {name: CHARACTER * len(name) + 2 * PADDING for name in needs}
    places, lines = _laid_out(needs, widths)
    nodes = [
        Node(
            name,
            name in lineage.stages,
            lineage.digests[name] if name in lineage.stages else data[name],
            read,
            about[name],
            places[name],
            widths[name],
        )
        for name, read in needs.items()
    ]
    arrows = [Arrow(source, target, _curve(points)) for (source, target), points in lines.items()]
    width = max(node.place[0] + node.width / 2 for node in nodes) + MARGIN
    drawn = [node.place for node in nodes] + [point for line in lines.values() for point in line]
    height = max(y for _, y in drawn) + HEIGHT / 2 + MARGIN
    return Picture(nodes, arrows, width, height)


def _concerned(finding: Finding, lineage: Lineage) -> Sequence[str]:
    """The nodes that a finding is about: a stage, data, what made a path, or who read code."""
    name = finding.artefact.split(" (")[0]
    stage = name.removeprefix(f"{FOLDER}/").removesuffix(SUFFIX)
    if stage in lineage.stages:
        return [stage]
    readers = lineage.readers_of(name)
    data = dict.fromkeys(path for reader in readers for path in lineage.data_of(reader))
    made = {path: maker for maker, it in lineage.stages.items() for path in it.outputs}
    wholes = [path for path in (*data, *made) if f"{name}/".startswith(f"{path}/")]
    return [made.get(path, path) for path in wholes] or ([] if lineage.makers_of(name) else readers)


def _laid_out(
    needs: dict[str, list[str]], widths: dict[str, float]
) -> tuple[dict[str, tuple[float, float]], dict[tuple[str, str], Points]]:
    """Centres of the nodes, and through which points each arrow goes."""
    from grandalf.graphs import Edge, Vertex, graph_core
    from grandalf.layouts import SugiyamaLayout, VertexViewer
    from grandalf.routing import EdgeViewer
    from networkx import DiGraph, transitive_reduction, weakly_connected_components

    graph = DiGraph([(need, name) for name, read in needs.items() for need in read])
    graph.add_nodes_from(needs)
    kept = set(transitive_reduction(graph).edges)
    vertices: dict[str, Any] = {name: Vertex(name) for name in needs}
    for name, vertex in vertices.items():
        # The method goes downwards: what is wide there is high here.
        vertex.view = VertexViewer(w=round(HEIGHT), h=round(widths[name]))
    edges: list[Any] = [
        Edge(vertices[need], vertices[name])
        for name, read in needs.items()
        for need in read
        if (need, name) in kept
    ]
    for edge in edges:
        edge.view = EdgeViewer()
    places: dict[str, tuple[float, float]] = {}
    lines: dict[tuple[str, str], Points] = {}
    top = MARGIN
    for names in sorted(weakly_connected_components(graph), key=min):
        # Lists, because the order of sets would be another one each time.
        part = graph_core(
            [vertex for name, vertex in vertices.items() if name in names],
            [edge for edge in edges if edge.v[0].data in names],
        )
        layout: Any = SugiyamaLayout(part)
        layout.xspace, layout.yspace = NODE_GAP, RANK_GAP
        layout.init_all()
        layout.draw()
        views = [vertex.view for vertex in part.sV]
        left = min(view.xy[1] - view.h / 2 for view in views) - MARGIN
        high = min(view.xy[0] - view.w / 2 for view in views) - top
        for vertex in part.sV:
            x, y = vertex.view.xy
            places[vertex.data] = y - left, x - high
        for edge in part.sE:
            source, target = (vertex.data for vertex in edge.v)
            between = [(y - left, x - high) for x, y in edge.view._pts[1:-1]]
            lines[source, target] = [
                (places[source][0] + widths[source] / 2, places[source][1]),
                *between,
                (places[target][0] - widths[target] / 2, places[target][1]),
            ]
        drawn = [*places.values(), *(point for line in lines.values() for point in line)]
        top = max(y for _, y in drawn) + HEIGHT / 2 + NODE_GAP
    return places, lines


def _curve(points: Points) -> str:
    """Through the points, level at each of them."""
    (x, y), *rest = points
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in rest:
        middle = (x + to_x) / 2
        path += f"C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return path


def as_svg(found: Audit) -> str:
    """The picture alone."""
    return _svg(draw(found), _styles())


def as_page(found: Audit) -> str:
    """The picture with the facts of each node, in one file that asks no network."""
    picture = draw(found)
    script = (HERE / "lineage.js").read_text()
    severities = [finding.severity for finding in found.findings]
    return render(
        "lineage.html",
        found=found,
        picture=picture,
        svg=_svg(picture, ""),
        style=_styles(),
        script=script,
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        anchors={node.name: node.anchor for node in picture.nodes},
        counts={severity: severities.count(severity) for severity in EXIT_CODES},
        short=SHORT,
    )


def _svg(picture: Picture, style: str) -> str:
    return render("lineage.svg", picture=picture, style=style, height=HEIGHT)


def _styles() -> str:
    return "".join(path.read_text() for path in STYLES)
