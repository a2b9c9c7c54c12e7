"""Ranks: processes that train one model together, each on its own rows, with torch.distributed.

    lora train --nproc 2 ...                       launch(): the ranks of one machine
    torchrun --nnodes 2 ... -m lora train ...      several machines, through torchrun's rendezvous

Trainable parameters are plain tensors, the same on every rank, even if the base is sharded: an
adapter is small. So the optimizer step, clipping and saving are the same in both ways: every rank
adds up the gradients of its rows, total() sums them over the ranks in one message, and all take the
same step. DistributedDataParallel would overlap that message with the backward; for a few megabytes
that gains nothing.

    data parallel   every rank holds the base
    sharded         every rank holds a piece of each tensor of the frozen base (FSDP2, fully_shard);
                    a block is put together for its forward and its backward, and let go

In both, every rank takes part in every message: one without a row computes a row that counts 0.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora.errors import ConfigError, LoraError, RunError, TrainingError
from lora.finetune import devices
from lora.injection import init
from lora.inventory import Parts, adapter_parts, injected, wrappers_of
from lora.targets import base_paths, unwrapped
from lora.wrappers import AdaptedLayer, SavedModule

WAIT = datetime.timedelta(minutes=10)  # for a rank that is slower, not gone: that shows at once


def launched() -> bool:
    """True if torchrun or launch() started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, from 0; 0 outside a group."""
    return dist.get_rank() if _up() else 0


def size() -> int:
    """The number of ranks; 1 outside a group."""
    return dist.get_world_size() if _up() else 1


def _up() -> bool:
    return dist.is_available() and dist.is_initialized()


def device(name: str = "auto") -> torch.device:
    """The device of this rank, as --device names it. It becomes torch's current device.

    Raises ConfigError if it is not there.
    """
    return devices.device_named(name, int(os.environ["LOCAL_RANK"]) if launched() else None)


@contextmanager
def group(alone: bool = False, on: str = "auto") -> Iterator[None]:
    """Inside, the ranks can exchange tensors: with gloo on CPUs, with NCCL on CUDA. `on` is
    --device.

    Does nothing if this process was not launched as one of several; with `alone` it then makes a
    group of one, which shard() needs. Raises TrainingError if the ranks do not find each other.
    """
    if not launched() and not alone:
        yield
        return
    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
    backend = backends.get(device(on).type, "gloo")
    options: Any = {} if launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    try:
        dist.init_process_group(backend, timeout=WAIT, **options)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {os.environ.get('RANK', 0)} does not find the others: {_line(error)}. Start all"
            " of them by one torchrun command, on every machine with the same --rdzv-endpoint."
        ) from error
    yield
    # Not after an error: the others notice the end of this process, and wait for it.
    dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Inside, a message that fails because another rank is gone raises a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"rank {rank()} of {size()} waited for another rank, which is gone or does not answer"
            f" ({_line(error)}). If it could report an error, that is above."
        ) from error


def _line(error: BaseException) -> str:
    """The first sentence of an error, without its place in the C++ code."""
    line = str(error).strip().partition("\n")[0].rpartition("] ")[2]
    return line.partition(". ")[0].rstrip(".")


def total(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over the ranks, in place, with one message for each dtype."""
    if size() > 1:
        with together():
            for message in _messages(tensors):
                dist.all_reduce(message)


def same(tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's values to every rank, in place, with one message for each dtype."""
    if size() > 1:
        with together():
            for message in _messages(tensors):
                dist.broadcast(message, 0)


@torch.no_grad()
def _messages(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yields the tensors as one flat tensor for each dtype; writes it back to them afterwards."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        yield flat
        sizes = [tensor.numel() for tensor in alike]
        for tensor, values in zip(alike, torch.split(flat, sizes), strict=True):
            tensor.copy_(values.view_as(tensor))


def gather(thing: Any) -> list[Any]:
    """Returns what each rank passed, in the order of the ranks. It is sent pickled."""
    if size() == 1:
        return [thing]
    things: list[Any] = [None] * size()
    with together():
        dist.all_gather_object(things, thing)
    return things


@contextmanager
def alike() -> Iterator[None]:
    """Every rank leaves the block, or none: a LoraError on any rank ends all of them.

    Rank 0 reports it once: it raises its own error, or a RunError that names the rank and its
    error. The others exit silently with code 2 once rank 0 is gone.
    """
    failure: LoraError | None = None
    try:
        yield
    except LoraError as error:
        failure = error
    messages = gather(failure and f"{type(failure).__name__}: {failure}")
    failed = [number for number, message in enumerate(messages) if message is not None]
    if not failed:
        return
    if rank() > 0:
        with suppress(TrainingError):
            gather(None)  # never answered; it fails once rank 0 has reported the error and ended
        raise SystemExit(2)
    first = failed[0]
    raise failure or RunError(f"rank {first} of {size()} cannot continue. {messages[first]}")


def shard(
    model: nn.Module,
    pieces: MutableMapping[str, Tensor] | None = None,
    seed: int = 0,
    offload: bool = False,
    on: torch.device | None = None,
) -> None:
    """Shard the frozen base among the ranks, in place: FSDP2, block by block.

    A block is an element of an nn.ModuleList that has layers within. The input embedding is a block
    if it is not tied, and the rest of the model is one more, gathered from forward to backward.
    Call it last: with the adapters on, in the final dtypes, with gradient checkpointing enabled.
    All else is on the device `on`, by default device(), the same on every rank: trainable
    parameters, adapters, what two blocks share, and scalars. If a bfloat16 product meets a float32
    weight, FSDP2 keeps the cast of that weight whole: call memory.set_dtype() first.

    pieces: those of a base that models.load_base cut as it was read, by name. Each is taken out as
            it is put in, and the adapters are then filled from `seed`, as inject would have.
    offload: keep the pieces in the memory of the CPU, and fetch each block to the accelerator.

    Every rank has to call it, within group(); and later lora.save, with writes=False on all but
    one, lora.load and lora.init. A sharded base cannot be merged: load it again.
    Raises ConfigError.
    """
    # A second of importing, which data parallel runs are spared.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    here, pieces = on or device(), {} if pieces is None else pieces
    if offload and here.type == "cpu":
        raise ConfigError(
            "--offload keeps the base in the CPU's memory, and this machine has no accelerator, so"
            " it is there already. Remove --offload."
        )
    from_pieces = bool(pieces)
    for name in injected(model):
        for part in _modules_of(adapter_parts(model, name)):
            if any(parameter.is_meta for parameter in part.parameters()):
                part.to_empty(device=here)
    originals = [saved.original_module for saved in wrappers_of(model)[1].values()]
    # The inner ones first.
    units = list(dict.fromkeys([*originals, *_untied_embedding(model), *_blocks(model), model]))
    names = {parameter: name for name, parameter in reversed(list(base_paths(model)))}
    homes = _homes(units)
    mesh = init_device_mesh(here.type, (size(),))
    whole = _keep_whole(homes, names, pieces, mesh, here)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for unit in units:
        fully_shard(unit, mesh=mesh, offload_policy=policy, ignored_params=whole)
    places = {names[parameter]: home for parameter, home in homes.items() if parameter in names}
    for name in list(pieces):
        _, module, leaf = places[name][0]
        cut: Any = torch.empty_like(module.get_parameter(leaf), device="cpu" if offload else here)
        cut.to_local().copy_(pieces.pop(name))
        parameter = nn.Parameter(cut, requires_grad=False)
        for _, module, leaf in places[name]:
            module._parameters[leaf] = parameter
    if from_pieces:
        for name in injected(model):
            init(model, seed, name)


Home = tuple[int, nn.Module, str]  # the number of a unit, a module in it, and the parameter's name


def _homes(units: Sequence[nn.Module]) -> dict[nn.Parameter, list[Home]]:
    """Returns where each parameter is used: in which units, by which modules."""
    homes: dict[nn.Parameter, list[Home]] = {}
    for number, unit in enumerate(units):
        for module in _outside_units(unit, units):
            for leaf, parameter in module.named_parameters(recurse=False):
                homes.setdefault(parameter, []).append((number, module, leaf))
    return homes


def _keep_whole(
    homes: Mapping[nn.Parameter, list[Home]],
    names: Mapping[nn.Parameter, str],
    pieces: MutableMapping[str, Tensor],
    mesh: Any,
    here: torch.device,
) -> set[nn.Parameter]:
    """Put on the device `here` what is not sharded, joined from the ranks' pieces if it is cut.

    These are trainable parameters, parameters of adapters, of two units, and scalars.
    """
    from torch.distributed.tensor import DTensor, Shard

    whole = set[nn.Parameter]()
    for parameter, home in homes.items():
        frozen = parameter in names and not parameter.requires_grad
        if frozen and parameter.dim() and len({number for number, *_ in home}) == 1:
            continue
        kept = parameter
        if parameter.is_meta:
            piece = pieces.pop(names[parameter]).to(here, parameter.dtype)
            shape, stride = parameter.shape, parameter.stride()
            joined = DTensor.from_local(piece, mesh, [Shard(0)], shape=shape, stride=stride)
            kept = nn.Parameter(joined.full_tensor(), parameter.requires_grad)
            for _, module, leaf in home:
                module._parameters[leaf] = kept
        kept.data = kept.data.to(here)
        whole.add(kept)
    return whole


def _modules_of(parts: Parts) -> Iterator[nn.Module]:
    """The modules that an adapter consists of."""
    yield from parts.adapters.values()
    yield from parts.copies.values()


def _untied_embedding(model: nn.Module) -> Iterator[nn.Module]:
    """The input embedding, where nothing else reads its weight: no backward asks for it then."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(table, nn.Embedding | AdaptedLayer):
        weight = unwrapped(table).weight
        if sum(p is weight for m in model.modules() for p in m._parameters.values()) == 1:
            yield table


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost nn.ModuleLists that have layers within, and are called."""
    if isinstance(module, AdaptedLayer | SavedModule):
        return
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and any(unwrapped(child).children())
        if listed and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from _blocks(child)


def _outside_units(module: nn.Module, units: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yields the module and the modules inside it, except units and what is inside them."""
    yield module
    for child in module.children():
        if not any(child is unit for unit in units):
            yield from _outside_units(child, units)


def launch(count: int, arguments: Sequence[str], on: str = "auto") -> int:
    """Run `lora ARGUMENTS` as `count` ranks on this machine. Returns the exit code. `on` is
    --device.

    It is that of the rank that failed first, 0 if none did; 130 or 143 if this process was told to
    stop (Ctrl-C, SIGTERM). It tells each rank once, gives them 30 seconds to end, and ignores
    further signals meanwhile. The ranks share the cores unless OMP_NUM_THREADS is set. Raises
    TrainingError if a rank was killed, since it cannot say so itself, and ConfigError if there are
    fewer accelerators than ranks.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    available = devices.count_of("cuda" if on == "auto" else on.partition(":")[0])
    if 0 < available < count:  # 0: ranks on the CPU share its cores; each reports a missing device
        raise ConfigError(
            f"--nproc {count}: each rank needs its own accelerator, found {available}. Set"
            f" --nproc {available}, or --device cpu."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    with tempfile.TemporaryDirectory() as folder, _stop_signals_raise():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",  # not ours: torch would react to a second one of them too
        )
        try:
            elastic_launch(config, sys.executable)("-m", "lora", *arguments)
        except SignalException as told:
            return 128 + int(told.sigval)
        except ChildFailedError as failed:
            return _exit_code(failed, count)
    return 0


@contextmanager
def _stop_signals_raise() -> Iterator[None]:
    """Inside, the first stop signal raises torch's SignalException, and later ones are ignored.
    torch's logging is off, since each rank reports its own error."""
    from torch.distributed.elastic.multiprocessing import SignalException

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, frame: FrameType | None) -> None:
        for stop_signal in signals:
            signal.signal(stop_signal, signal.SIG_IGN)
        raise SignalException("told to stop", signal.Signals(number))

    logging.disable()
    try:
        for number in signals:
            if before[number] != signal.SIG_IGN:  # as under nohup
                signal.signal(number, stop)
        yield
    finally:
        logging.disable(logging.NOTSET)
        for number in signals:
            signal.signal(number, before[number])


def _exit_code(failed: Any, count: int) -> int:
    """Returns the exit code of the rank that failed first. Raises TrainingError if killed."""
    number, failure = failed.get_first_failure()
    # A rank that finds another one gone may be noticed before that one.
    for other, also in failed.failures.items():
        killed = also.exitcode < 0 and also.exitcode != -signal.SIGTERM
        if killed and also.timestamp <= failure.timestamp + 1:
            number, failure = other, also
    if failure.exitcode < 0:
        raise TrainingError(
            f"rank {number} of {count} (process {failure.pid}) was ended by"
            f" {failure.signal_name()}; the others were stopped."
        ) from None
    return int(failure.exitcode)
