"""What holds for every network, tried on random ones: 100 here, as many as BNSURGERY_EXAMPLES says elsewhere."""

import contextlib
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_networks import networks
from torch import nn

import bnsurgery
from bnsurgery import FoldError, NoSitesError, fold, insert, load, plan, record, save, verify

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*had no bias:bnsurgery.BNSurgeryWarning")]

EXAMPLES = int(os.environ.get("BNSURGERY_EXAMPLES", "100"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors
    yield
    torch.set_num_threads(threads)


def same_state(a, b):
    return list(a) == list(b) and all(map(torch.equal, a.values(), b.values()))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="BNSURGERY_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(
    network=networks(),
    placement=st.sampled_from(["pre-activation", "pre-activation", "post-activation"]),
    fuse_relu=st.booleans(),
    head=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_network(network, placement, fuse_relu, head, seed):
    model, shape = network
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, *shape, generator=generator) for _ in range(2)]
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    printed = str(model)
    try:
        sites = plan(model, batches[0], placement=placement, head=head).sites
    except (NoSitesError, bnsurgery.UntraceableModelError) as error:
        event(type(error).__name__)
        assert "normal" in str(error) or "no place" in str(error) or "if x.mean() > 0" in str(error)
        return
    event(f"{min(len(sites), 6)} sites")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnsurgery.BNSurgeryWarning)  # dead channels
        bn_model = insert(model, batches, placement=placement, fuse_relu=fuse_relu, head=head)

    # The function is the same to the bit, on new data too, and the original was not touched.
    fresh = [torch.randn(2, *shape, generator=generator) * 3]
    assert verify(model, bn_model, fresh, drift_batch_sizes=()).bit_identical
    assert str(model) == printed and same_state(model.state_dict(), original)
    # There is nothing left to do.
    with contextlib.suppress(NoSitesError):
        assert not plan(bn_model, batches[0], placement=placement, head=head).sites
    # All comes back.
    folded = fold(bn_model)
    assert str(folded) == printed and same_state(folded.state_dict(), original)
    # And survives a file.
    with tempfile.TemporaryDirectory() as folder:
        save(bn_model, Path(folder, "net"))
        again = load(Path(folder, "net"), model=model)
    assert str(again) == str(bn_model) and same_state(again.state_dict(), bn_model.state_dict())
    assert record(again) == record(bn_model)
    assert verify(bn_model, again, fresh, drift_batch_sizes=()).bit_identical

    # Trained, it folds to the same function, or says which norm cannot be.
    with torch.no_grad():
        for inserted in record(bn_model).sites:
            norm = bn_model.get_submodule(inserted.norm)
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            norm.weight.mul_(1 + 0.1 * torch.randn(norm.weight.shape, generator=generator))
            norm.bias.add_(0.1 * torch.randn(norm.bias.shape, generator=generator))
    try:
        folded = fold(bn_model)
        event("folds")
        assert str(folded).replace("bias=False, ", "").replace(", bias=False", "") == printed.replace(
            "bias=False, ", ""
        ).replace(", bias=False", "")
    except FoldError as error:
        event("folds in part")
        assert "'" in str(error)
        folded = fold(bn_model, allow_partial=True)
    report = verify(bn_model, folded, fresh, drift_batch_sizes=())
    float64 = next(model.parameters()).dtype == torch.float64
    # Some ten layers, each a sum of up to a few hundred products, relative to the largest output.
    assert report.max_rel < (1e-12 if float64 else 1e-4)
