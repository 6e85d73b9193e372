"""Draw the graph of a network with the sites of a plan marked, as Graphviz's DOT or as SVG."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from torch import fx, nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import counted

from .planning import Plan
from .tracing import Trace, is_layer, is_norm

_COLOURS = {"site": "#b7e4c7", "skipped": "#ffd6a5", "norm": "#cfe2ff", "plain": "#f1f3f5"}
_LEGEND = {"site": "gets a BatchNorm", "skipped": "layer without one", "norm": "a norm", "plain": "anything else"}
_BOX = {"rx": "3", "stroke": "#868e96"}
_CHAR, _LINE, _PAD, _GAP = 7.0, 16.0, 8.0, 26.0  # pixels: letter width, line height, space inside and between boxes


@dataclass(frozen=True)
class _Box:
    """One call in the forward pass: the lines of its label, the key of its colour, and its tooltip."""

    label: tuple[str, ...]
    kind: str
    tip: str


def dot(model: nn.Module, example: Any, plan: Plan) -> str:
    """The graph of `model`'s forward pass in the DOT language, with the sites and skipped layers of `plan` coloured."""
    graphviz = _library("graphviz")
    boxes, edges = _graph(model, example, plan)
    graph = graphviz.Digraph(plan.model, node_attr={"shape": "box", "style": "filled", "fontname": "sans-serif"})
    for index, box in enumerate(boxes):
        label, tip = graphviz.escape("\n".join(box.label)), graphviz.escape(box.tip)
        graph.node(str(index), label, fillcolor=_COLOURS[box.kind], tooltip=tip)
    for source, target in edges:
        graph.edge(str(source), str(target))
    return str(graph.source)


def svg(model: nn.Module, example: Any, plan: Plan) -> str:
    """The same graph as an SVG picture, from top to bottom; tooltips give the reasons for skipped layers.

    References: Sugiyama, Tagawa & Toda 1981 (the layout).
    """
    boxes, edges = _graph(model, example, plan)
    widths = [max(map(len, box.label)) * _CHAR + 2 * _PAD for box in boxes]
    gaps = {"hgap": max(widths) + _GAP, "vgap": 2 * _LINE + 2 * _PAD + _GAP}
    places = _library("igraph").Graph(len(boxes), edges, directed=True).layout_sugiyama(**gaps)
    bends = zip(edges, places.edge_routing, strict=True)
    routes = [[places[source], *bend, places[target]] for (source, target), bend in bends]
    sides = [(x - w / 2, x + w / 2) for (x, _), w in zip(places, widths, strict=True)]
    sides += [(x, x) for route in routes for x, _ in route]
    left, right = min(a for a, _ in sides) - _GAP, max(b for _, b in sides) + _GAP
    width, top = max(right - left, 360.0), -(len(_LEGEND) + 3) * _LINE - _GAP
    height = max(y for _, y in places) + 2 * _LINE + 2 * _GAP - top
    view, look = f"{left:.0f} {top:.0f} {width:.0f} {height:.0f}", {"font-family": "sans-serif", "font-size": "12"}
    size = {"viewBox": view, "width": f"{width:.0f}", "height": f"{height:.0f}"}
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **size, **look})
    title = f"{plan.model}: {counted(len(plan.sites), 'site')}, {len(plan.skipped)} skipped"
    _add(root, "title", title)
    _add(root, "rect", x=left, y=top, width=width, height=height, fill="white")
    _add(root, "text", title, x=left + _GAP, y=top + 1.5 * _LINE, **{"font-weight": "bold"})
    for index, (kind, meaning) in enumerate(_LEGEND.items()):
        x, y = left + _GAP, top + (index + 2.2) * _LINE
        _add(root, "rect", x=x, y=y, width=2 * _LINE, height=0.8 * _LINE, fill=_COLOURS[kind], **_BOX)
        _add(root, "text", meaning, x=x + 2.5 * _LINE, y=y + 0.7 * _LINE)
    for route in routes:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in route)
        _add(root, "polyline", points=points, fill="none", stroke="#868e96")
    for (x, y), w, item in zip(places, widths, boxes, strict=True):
        group, h = _add(root, "g"), len(item.label) * _LINE + _PAD
        _add(group, "title", item.tip)
        _add(group, "rect", x=x - w / 2, y=y - h / 2, width=w, height=h, fill=_COLOURS[item.kind], **_BOX)
        for line, text in enumerate(item.label, 1):
            _add(group, "text", text, x=x, y=y - h / 2 + line * _LINE - 1, **{"text-anchor": "middle"})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _graph(model: nn.Module, example: Any, plan: Plan) -> tuple[list[_Box], list[tuple[int, int]]]:
    """A box for each call, in order, and pairs of their indices; unused results (shapes) are left out."""
    trace = Trace(model, Inputs.of(example))
    nodes = [node for node in trace.nodes if node.op != "get_attr" and (node.users or node.op == "output")]
    index = {node: number for number, node in enumerate(nodes)}
    sites = {site.name for site in plan.sites}
    skipped = {skip.name: skip.reason for skip in plan.skipped}
    boxes = [_box(trace, node, sites, skipped) for node in nodes]
    edges = [(index[source], index[node]) for node in nodes for source in node.all_input_nodes if source in index]
    return boxes, edges


def _box(trace: Trace, node: fx.Node, sites: set[str], skipped: dict[str, str]) -> _Box:
    module = node.meta.get("module")
    name = trace.names.get(module, node.name)
    kind = getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__
    if node.op in ("placeholder", "output"):
        return _Box((kind,), "plain", "input" if node.op == "placeholder" else "output")
    if name in sites:
        return _Box((name, f"{kind} + BatchNorm"), "site", "gets a BatchNorm")
    if name in skipped or is_layer(node):
        return _Box((name, kind), "skipped", skipped.get(name, "a layer of another kind"))
    label = (name, kind) if module is not None else (kind,)
    return _Box(label, "norm" if is_norm(node) else "plain", name)


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: Any) -> ElementTree.Element:
    shown = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in attributes.items()}
    element = ElementTree.SubElement(parent, tag, shown)
    element.text = text and "".join(c if c.isprintable() else "�" for c in text)
    return element


def _library(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise BNSurgeryError(f"plan: drawing needs {name}, which is not installed: pip install 'bnsurgery[plot]'")
    return importlib.import_module(name)
