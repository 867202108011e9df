"""Many processes that train one policy: FSDP2 shards it, and what each of them finds is summed.

Every process runs the same program on its own share of each step. A loss is divided by the
normaliser of the whole step wherever it is computed, so losses, metrics and gradients of the
processes add up, and nothing is averaged. In a process of its own all of this is the plain thing.
"""

import heapq
import warnings
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def summed(values: dict[Key, Any]) -> dict[Key, Any]:
    """Each number summed over the processes, in float64; all of them bring the same keys."""
    if size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    pairs = zip(values.items(), sums.tolist(), strict=True)
    return {key: type(value)(total) for (key, value), total in pairs}


def of_first(values: dict[Key, Any]) -> dict[Key, Any]:
    """The first process's numbers, in every process; all of them bring the same keys."""
    mine = values if rank() == 0 else {key: type(value)(0) for key, value in values.items()}
    return summed(mine)


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return summed({"flag": flag})["flag"]


def wait() -> None:
    """Until all processes have come here."""
    anyone(False)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each process holds a shard."""
    if size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shares(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal numbers out so that the costs of the shares are near to each other.

    The dearest come first, each to the share that is cheapest so far, ties to the earliest. Within
    a share the numbers keep their order.

    Args:
        costs: of each number from 0 on.
        num_shares: some are empty if there are fewer numbers.
    """
    loads = [(0, share) for share in range(num_shares)]
    dealt: list[list[int]] = [[] for _ in range(num_shares)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, share = heapq.heappop(loads)
        dealt[share].append(number)
        heapq.heappush(loads, (load + costs[number], share))
    return [sorted(share) for share in dealt]


class Sharded(nn.Module):
    """A policy whose parameters lie in shards, one a process, until somebody reads it.

    FSDP2 gathers the parameters outside the layers (embeddings, the last norm, the LM head) while
    its root's forward runs. The engine does not call a policy's own forward: it asks the decoder
    for hidden states and multiplies by the LM head itself. So the root is this module, and its
    forward is whatever reads the policy.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, read: Callable[[], T]) -> T:
        """What `read` returns; every process must read, and run as many layers as the others."""
        return read()

    @contextmanager
    def unsharded(self) -> Generator[None, None, None]:
        """Within, every process holds all parameters and reads them as often as it likes."""
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(self, FSDPModule):
            yield
            return
        layers = [part for part in self.policy.modules() if isinstance(part, FSDPModule)]
        for part in (self, *layers):
            part.unshard()
        # The root keeps its own after a forward in any case.
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
            # Shards again, and forgets the order of these forwards: none of them goes backwards.
            self.reset_iter_state()


def sharded(policy: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> Sharded:
    """Shard the parameters of `policy` in place, if there are several processes.

    Args:
        policy: the same in every process.
        layers: its largest parts; each is gathered when it is run, and let go after it.
        device: the one of this process.
    """
    root = Sharded(policy)
    if size() == 1:
        return root
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    for module in (*layers, root):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        # Gradients are summed: the losses are shares of the step's mean already.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


@torch.no_grad()
def gather(policy: nn.Module, into: nn.Module) -> None:
    """Copy the parameters of a sharded policy into a whole one of the same architecture."""
    theirs = dict(into.named_parameters())
    for name, parameter in policy.named_parameters():
        theirs[name].copy_(whole(parameter))


def write(tensors: dict[str, Tensor], directory: Path) -> None:
    """Save tensors as safetensors files, each process its own shards; done when all are."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(
        dict[str, Any](tensors),
        storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True),
    )


def read(directory: Path, like: Callable[[str, torch.Size], Tensor]) -> dict[str, Tensor]:
    """Load what any number of processes saved, each process the shards that it needs.

    Args:
        directory: of safetensors files.
        like: makes the tensor, or the shard, that a name and a whole shape are loaded into.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    tensors = {
        name: like(name, saved.size)
        for name, saved in reader.read_metadata().state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # In a process of its own torch remarks that it is one.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(dict[str, Any](tensors), storage_reader=reader)
    return tensors
