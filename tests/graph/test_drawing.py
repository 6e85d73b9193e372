"""The picture of a plan: every call a box, every tensor a line, names that need escaping."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.zoo import NETWORKS
from bnsurgery import BNSurgeryError, plan
from bnsurgery.graph import drawing

SVG = "{http://www.w3.org/2000/svg}"


def picture(model, x):
    return ElementTree.fromstring(drawing.svg(model, x, plan(model, x)))


def boxes(root):
    """Text of every box, with what the mouse says and its colour."""
    return [
        (" ".join(t.text for t in group.iter(f"{SVG}text")), group.find(f"{SVG}title").text,
         group.find(f"{SVG}rect").get("fill"))
        for group in root.iter(f"{SVG}g")
    ]  # fmt: skip


def test_boxes_and_lines():
    network = NETWORKS["u-net"]
    model, (x,) = network.make(), network.batches(1, 1)
    root = picture(model, x)
    found = boxes(root)
    green = [text for text, _, fill in found if fill == "#b7e4c7"]
    assert len(green) == 12 and "up1 ConvTranspose2d + BatchNorm" in green
    assert ("out Conv2d", "output layer (`head=True` takes it, too)", "#ffd6a5") in found
    assert sum(text == "cat" for text, _, _ in found) == 2
    # One chain, and two skips that join it again: as many lines as boxes, and one more.
    assert len(list(root.iter(f"{SVG}polyline"))) == len(found) + 1
    assert root.find(f"{SVG}title").text == "UNet: 12 sites, 1 skipped"


def test_everything_is_inside_the_picture():
    network = NETWORKS["siamese"]
    model, (x,) = network.make(), network.batches(1, 1)
    root = picture(model, x)
    left, top, width, height = map(float, root.get("viewBox").split())
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        x0, y0, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert left <= x0 and x0 + w <= left + width and top <= y0 and y0 + h <= top + height
    for line in root.iter(f"{SVG}polyline"):
        for point in line.get("points").split():
            px, py = map(float, point.split(","))
            assert left <= px <= left + width and top <= py <= top + height


def test_names_are_escaped():
    model = nn.Sequential()
    model.add_module('<script>"&\n', nn.Conv2d(3, 4, 1))
    model.add_module("relu", nn.ReLU())
    model.add_module("end", nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 4, 4)
    assert any('<script>"&\ufffd' in text for text, _, _ in boxes(picture(model, x)))
    text = drawing.dot(model, x, plan(model, x))
    assert '\\"&' in text and text.count("{") == text.count("}")


def test_needs_its_libraries(monkeypatch):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4)
    found = plan(model, x)
    for draw in (drawing.svg, drawing.dot):
        with pytest.raises(BNSurgeryError, match=r"pip install 'bnsurgery\[plot\]'"):
            draw(model, x, found)
