"""A GPU for machines without one: the scripts' GPU code runs, and what a GPU would refuse is refused.

`Device` lets tensors of the CPU say that they are on a GPU, and raises where an operation mixes the two. `Graph` stands
in for torch.cuda.CUDAGraph: it records the operations between two calls and replays them on the same tensors, Python
left out. What it does not show: kernels that behave otherwise, memory, speed.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
MAY_MIX = ("copy_", "__set__", "view_as", "_has_compatible_shallow_copy_type")  # functions of both devices
STACKS = ("cat", "stack", "concatenate")  # not even a number of the CPU's may take part


def on_gpu(x: torch.Tensor) -> bool:
    return getattr(x, "pretended", False)


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def place(tree, gpu: bool):
    """Mark all tensors of `tree` as being on the GPU or on the CPU; returns `tree`."""
    for x in tensors_of(tree):
        x.pretended = gpu
    return tree


class Device(TorchFunctionMode):
    """Every function of PyTorch goes through here. `recording`: a graph takes nothing of the CPU's along."""

    recording = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = tensors_of((args, kwargs))
        gpu = any(map(on_gpu, tensors))
        if func == torch.Tensor.device.__get__:
            return GPU if gpu else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return gpu
        if name in ("to", "cpu", "cuda"):
            return self.move(*args, **kwargs) if name == "to" else self.move(args[0], name)
        assert not (gpu and name in ("numpy", "__array__")), "numpy of a tensor on the GPU"
        device = kwargs.pop("device", None)
        if is_gpu(device):
            assert kwargs.get("generator") is None, f"{name}: the generator is on the CPU"
            copies = name in ("tensor", "as_tensor", "from_numpy") and not gpu
            assert not (copies and self.recording), f"{name}: a copy from the CPU while a graph is recorded"
        mixed = gpu and not all(map(on_gpu, self.together(name, args, tensors)))
        assert not mixed, f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
        result = func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:
            place(args[0], on_gpu(args[1]))
        elif device is not None:
            moved = name == "as_tensor" and gpu != is_gpu(device)
            result = place(result.clone() if moved else result, is_gpu(device))
        else:  # what was there before stays where it is
            place([x for x in tensors_of(result) if not hasattr(x, "pretended")], gpu)
        return result

    def together(self, name: str, args: tuple, tensors: list) -> list[torch.Tensor]:
        """Those of the tensors that must be on one device."""
        if self.recording:
            return tensors
        if name in MAY_MIX:
            return []
        if name == "__getitem__" or (name == "__setitem__" and not tensors_of(args[1])):
            return tensors[:1]  # indices may come from the CPU, and what a plain slice is set to
        return [x for x in tensors if name in STACKS or on_gpu(x) or x.ndim]

    def move(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Tensor.to, whose arguments are a device, a dtype or another tensor, and flags."""
        gpu, dtype = on_gpu(x), x.dtype
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                gpu, dtype = on_gpu(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)):
                gpu = is_gpu(value)
        assert gpu == on_gpu(x) or not self.recording, "to: a copy between devices while a graph is recorded"
        if gpu == on_gpu(x) and dtype == x.dtype:
            return x
        return place(x.clone().to(dtype), gpu)


class Recorder(TorchDispatchMode):
    """The operations that reach the device, and what the memory that they met held before."""

    def __init__(self):
        super().__init__()
        self.tape, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name != "aten::_local_scalar_dense", "a captured step may not wait for the device"
        for storage in storages((args, kwargs)):
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):  # memory of the step's own; the tape keeps it from being used again
            self.before.setdefault(storage.data_ptr(), None)
        self.tape.append((func, args, kwargs or {}, result))
        return result


def storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tensors_of(tree)]


class Graph:
    """torch.cuda.CUDAGraph: the same operations on the same tensors, with new random numbers."""

    def replay(self):
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self.tape:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def captured(graph: Graph, stream=None):
    """torch.cuda.graph: recording computes nothing, so what the CPU has computed meanwhile is undone."""
    random, Device.recording = torch.get_rng_state(), True
    try:
        with Recorder() as recorder:
            yield
    finally:
        Device.recording = False
    torch.set_rng_state(random)
    for storage, content in filter(None, recorder.before.values()):
        storage.copy_(content)
    graph.tape = recorder.tape


@contextlib.contextmanager
def pretended_gpu():
    """torch.cuda as the scripts use it; tensors made inside say where they are."""
    stream, load = SimpleNamespace(wait_stream=lambda other: None), torch.load
    copy = torch.nn.Parameter.__deepcopy__
    stand_ins = dict(
        is_available=lambda: True, is_initialized=lambda: True, get_device_name=lambda device=None: "a pretended GPU",
        CUDAGraph=Graph, graph=captured, Stream=lambda: stream, current_stream=lambda: stream,
        stream=lambda s: contextlib.nullcontext(), synchronize=lambda: None, manual_seed_all=lambda seed: None,
        is_bf16_supported=lambda including_emulation: True,
        get_rng_state=lambda: torch.ones(16, dtype=torch.uint8), set_rng_state=lambda state: None,
    )  # fmt: skip

    def load_to(file, map_location="cpu", **kwargs):
        return place(load(file, map_location="cpu", **kwargs), is_gpu(map_location))

    with pytest.MonkeyPatch.context() as patch, Device():
        for name, value in stand_ins.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "load", load_to)
        patch.setattr(torch.nn.Parameter, "__deepcopy__", lambda x, memo: place(copy(x, memo), on_gpu(x)))
        yield
