"""Communication between ranks: they gather short vectors, so that every rank sums them in the same order."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup  # a stub if torch was built without


def group_name(process_group: ProcessGroup | str | None) -> str:
    """The name of a process group, which custom ops, compiled graphs, copies and pickles can hold; "" for none."""
    if process_group is None or isinstance(process_group, str):
        return process_group or ""
    return process_group.group_name


def gather(vector: Tensor, group: str) -> Tensor:
    """One row per rank of the group: a collective without autograd that compiled graphs can hold."""
    from torch.distributed.distributed_c10d import _get_group_size_by_name

    size = _get_group_size_by_name(group)  # type: ignore[arg-type]  # a NewType of str, which compilers cannot trace
    rows = torch.ops._c10d_functional.all_gather_into_tensor(vector.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(rows).view(size, -1)


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Count (0-dim), mean and m2 (C,) of all ranks together, float64; a rank without samples changes nothing.

    Means are weighted by their counts and m2 gains n·(mean − overall mean)², so that no large numbers are subtracted.

    References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
    """
    rows = gather(torch.cat((count.view(1), mean, m2)), group)
    counts, (means, m2s) = rows[:, :1], rows[:, 1:].chunk(2, 1)
    total = counts.sum()
    overall = (counts * means).sum(0) / total.clamp_min(1)
    return total, overall, (m2s + counts * (means - overall).square()).sum(0)


def mean_over_ranks(sums: Tensor, count: int, group: str) -> Tensor:
    """`sums` divided by `count`, both summed over the ranks in their order."""
    total = gather(torch.cat((sums.flatten(), sums.new_full((1,), count))), group).sum(0)
    return (total[:-1] / total[-1]).view_as(sums)
