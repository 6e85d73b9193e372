"""The numbers of a report, against what hooks on the original network saw."""

import numpy as np
import pytest
import torch
from torch import nn

from bnsurgery import BNSurgeryWarning, ChannelMoments, insert, plan
from bnsurgery.report import cost, view_sites
from bnsurgery.running.batches import Inputs


def seen(model, name, batches):
    """All outputs of one layer in eval mode, one row a channel, in float64."""
    found = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, result: found.append(result))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = [x.flatten(0, -2).T if name == "tokens" else x.transpose(0, 1).flatten(1) for x in found]
    return torch.cat(rows, 1).double()


@pytest.mark.parametrize("name", ["part.<b>$x$</b>", "twice", "tokens"])
def test_statistics_and_histograms(name, odd, inserted, batches):
    view = {v.name: v for v in view_sites(inserted, batches)}[name]
    x = seen(odd, name, batches)
    mean, std = x.mean(1), x.std(1, correction=0)
    # The norm's running_mean and running_var are float32 (2⁻²⁴ relative, some ulps of μ and σ²).
    torch.testing.assert_close(view.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(view.std, std, rtol=1e-6, atol=1e-7)
    assert view.dead == int((std**2 < 1e-5).sum())
    assert view.near_eps == int(((std**2 >= 1e-5) & (std**2 < 1e-4)).sum())
    normalized = (x - mean[:, None]) / (std[:, None] ** 2 + 1e-5).sqrt()
    for histogram, values in ((view.before, x), (view.after, normalized)):
        counts, _ = np.histogram(values.numpy(), 80, (histogram.low, histogram.high))
        # A value within rounding of an edge may fall on either side of it.
        assert np.abs(histogram.counts.numpy() - counts).sum() <= 0.002 * values.numel()
        width = (histogram.high - histogram.low) / 80
        assert float(histogram.density.sum()) * width == pytest.approx(1)
    assert view.after.counts.sum() > 0.99 * x.numel()


def test_channels_that_say_little(inserted, batches):
    first, twice, _ = view_sites(inserted, batches)
    assert (first.dead, first.near_eps) == (1, 1)
    assert first.largest[1] < 0 < first.largest[2] and first.silent >= 1
    assert first.silent == int((first.largest <= 0).sum())
    assert twice.silent is None  # a tanh and a ReLU follow: it is not one activation's
    assert all(view.silent is None and view.before is None for view in view_sites(inserted))


def test_the_warning_of_insert_counts_the_same_dead_channels():
    """The first variance is above eps, but float32's nearest, which the norm has, is below."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 3, 4, 4)
    variance = torch.tensor([1e-5 * (1 + 1e-9), 2e-5, 1.0, 0.0], dtype=torch.float64)
    assert variance[0] > 1e-5 > variance.float()[0].double()
    moments = {"0": ChannelMoments(8, torch.zeros(4, dtype=torch.float64), 8 * variance)}
    with pytest.warns(BNSurgeryWarning, match="'0' 2 of 4"):
        bn_model = insert(model, [x], plan=plan(model, x), moments=moments)
    assert view_sites(bn_model)[0].dead == 2


def test_nothing_is_changed(inserted, batches):
    before = {name: tensor.clone() for name, tensor in inserted.state_dict().items()}
    inserted.train()
    state = torch.get_rng_state()
    view_sites(inserted, batches)
    assert isinstance(cost.measure_costs(inserted, inserted, Inputs.of(batches[0])), tuple)
    assert inserted.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inserted.state_dict().items())
    assert all(parameter.grad is None for parameter in inserted.parameters())


def test_costs(batches):
    """What autograd keeps of a conv without padding and a ReLU: the input (also the ReLU's) and the ReLU's output."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
    norm = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    before, after = cost.measure_costs(model, norm, Inputs.of(batches[0]))
    pixels = cost.IMAGES * 8 * 8 * 4  # bytes of a channel in float32
    assert (before.parameters, after.parameters) == (16, 24)
    assert before.kept_bytes == (3 + 4) * pixels
    # BatchNorm keeps its input, besides statistics of a few bytes and the workspace of its kernel.
    assert 0 <= after.kept_bytes - before.kept_bytes - 4 * pixels <= 256
    assert before.seconds > 0


def test_costs_that_cannot_be_measured(batches):
    class Detector(torch.nn.Module):
        def forward(self, x):
            if self.training:
                raise ValueError("targets should not be none when in training mode")
            return x

    assert "targets" in cost.measure_costs(Detector(), Detector(), Inputs.of(batches[0]))
    assert "two images" in cost.measure_costs(Detector(), Detector(), Inputs.of(batches[0][:1]))
