"""What an eager call of an op does on the host, with launches that a stand-in swallows: no GPU is needed."""

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402

import blockfp8_titan  # noqa: E402
from blockfp8_titan.kernels.launch import repeatable, start  # noqa: E402
from blockfp8_titan.ops import backend, gemm, library, quantize  # noqa: E402

GRID = (2, 3, 1)


class Compiled:
    """Stands for a triton.compiler.CompiledKernel: keeps the arguments of the launches that it is asked for."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs, self.indexed = [], []

    def run(self, *args):
        self.runs.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.indexed.append((grid, *args))


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_stream=lambda device: f"stream {device}"))


def test_a_launch_without_hooks_takes_the_short_way():
    compiled = Compiled()
    start(compiled, 3, GRID, (7, True))
    assert compiled.runs == [(*GRID, "stream 3", "function", "metadata", None, None, None, 7, True)]
    assert not compiled.indexed


def test_a_launch_is_repeated_as_triton_itself_would():
    """With Triton's own launcher, of this version, around a function that keeps what it is given."""
    from triton.backends.nvidia import driver as nvidia
    from triton.tools.tensor_descriptor import TensorDescriptor

    calls = []
    launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    launcher.launch = nvidia.wrap_handle_tensordesc(
        lambda *args: calls.append(args), {"x": "tensordesc<fp32[16]>", "n": "i32"}, [None]
    )
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    for name in ("num_ctas", "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature"):
        setattr(launcher, name, name)
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.gsan_enabled = False
    compiled = Compiled()
    compiled.run = launcher
    args = (TensorDescriptor(torch.zeros(64), [64], [1], [16]), 7)
    start(compiled, 3, GRID, args)
    repeat = repeatable(compiled, 3, GRID, args)
    assert len(calls) == 1 and "stream 3" in calls[0]
    repeat()
    repeat()
    assert str(calls[1]) == str(calls[0]) == str(calls[2])

    launcher.global_scratch_size = 1  # it would be allocated for each launch
    assert repeatable(compiled, 3, GRID, args).func is start


def test_a_profiler_sees_repeated_launches(monkeypatch):
    compiled = Compiled()
    repeat = repeatable(compiled, 3, GRID, (7, True))
    repeat()
    assert compiled.runs == [(*GRID, "stream 3", "function", "metadata", None, None, None, 7, True)]
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    repeat()
    assert len(compiled.runs) == 1 and compiled.indexed == [(GRID, 7, True)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_launches(name, monkeypatch):
    def hook(metadata):
        pass

    chain = type(knobs.runtime.launch_enter_hook)()
    chain.add(hook)
    for hooked in (chain, hook):
        compiled = Compiled()
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, hooked)
            start(compiled, 0, GRID, (7,))
        assert compiled.indexed == [(GRID, 7)] and not compiled.runs


class Kernel:
    """Stands for a JITFunction: counts compilations."""

    def __init__(self):
        self.fn, self.compiled = object(), []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(library, "on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(library, "_compiled", {})


def test_what_compiles_differently_is_compiled_again(on_cpu):
    kernel, x = Kernel(), torch.zeros(64, dtype=torch.bfloat16)
    launches = [
        ((x, 32), (), 1),
        ((x, 48), (), 1),  # another multiple of 16
        ((x[8:], 32), (), 1),  # another address, aligned
        ((x[1:], 32), (), 2),
        ((x, 33), (), 3),
        ((x, 34), (), 3),
        ((x, 1), (), 4),
        ((x, 2**31), (), 5),
        ((x, 2**31 + 1), (), 6),
        ((x.float(), 32), (), 7),
        ((x, 32), (True,), 8),
        ((x, 32), (False,), 9),
        ((x, 32), (), 9),
    ]
    for args, constants, compilations in launches:
        library.launch(kernel, GRID, args, constants, num_warps=4)
        assert len(kernel.compiled) == compilations, (args, constants)
    library.launch(kernel, GRID, (x, 32), (True,))
    assert kernel.compiled[7].runs[0][-3:] == (x.data_ptr(), 32, True)


def calls_of_the_package(run):
    """How many functions and methods the package's code calls, and how many of its functions are called."""
    package = str(Path(blockfp8_titan.__file__).parent)
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename.startswith(package)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "name, bound", [("quantize_1x128", 46), ("quantize_1x128_both", 68), ("quantize_128x128", 46), ("gemm", 37)]
)
def test_host_work_of_a_call_stays_small(name, bound, on_cpu, monkeypatch):
    """Calls, not a time, which would depend on the machine. There are 42, 67, 43 and 36."""
    monkeypatch.setattr(backend, "resolve_quantize_backend", lambda device: "triton")
    monkeypatch.setattr(backend, "is_hopper", lambda device: True)
    for module, found in ((quantize, "quantize"), (gemm, "gemm_hopper_launch")):
        real = library.kernels(found)
        stand_in = types.SimpleNamespace(**vars(real))
        if found == "gemm_hopper_launch":
            launches = real
            monkeypatch.setattr(real, "compiled", {})
            monkeypatch.setattr(real, "_launches", {})
            monkeypatch.setattr(real, "_counters", {})
            monkeypatch.setattr(real, "_zeros", lambda device: torch.zeros(4, dtype=torch.int32))
            monkeypatch.setattr(real, "_gemm_hopper_kernel", Kernel())
        else:
            for kernel in [k for k in vars(real) if k.endswith("_kernel")]:
                setattr(stand_in, kernel, Kernel())
        monkeypatch.setattr(module, "kernels", lambda name, stand_in=stand_in: stand_in)
    monkeypatch.setattr(gemm, "on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(gemm, "is_hopper", lambda device: True)
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.zeros(256, 256, dtype=torch.bfloat16)
    x_q, x_dq = blockfp8_titan.ops.quantize_1x128(x)
    if name == "gemm":
        out = torch.empty(256, 256, dtype=torch.bfloat16)
        x_q.new_empty = lambda *args, **kwargs: out  # one address, as from the caching allocator

        def run():
            return gemm._triton(x_q, x_dq, x_q, x_dq, True, torch.bfloat16)

    else:

        def run():
            return getattr(quantize, f"_cuda_{name.removeprefix('quantize_')}")(x, "fp32", "auto")

    for _ in range(3):  # compiled, prepared, and from then on as ever
        run()
    if name == "gemm":
        assert len(launches._launches) == 1
    assert 0 < calls_of_the_package(run) <= bound
