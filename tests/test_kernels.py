"""The kernels without a GPU: compiled for every supported chip, and run in Triton's interpreter."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from blockfp8_titan.kernels import both_hopper, gemm, gemm_hopper, producers, quantize  # noqa: E402

ROOT = Path(__file__).parent.parent
CAPABILITIES = [89, 90, 100, 120]
SHARED_MEMORY = {89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may take

INTS = {name: "i32" for name in ("M", "N", "K", "first_row")}
INTS |= {f"{name}_stride": "i32" for name in ("x", "xt", "w", "wt", "a", "b", "yt", "gate", "up", "ht", "dh")}
QUANTISED = ("x", "xt", "w", "wt", "y", "yt", "h", "ht", "gate", "up", "dgate", "dgatet", "dup", "dupt")
ONE_BYTE = {name: "*fp8e4nv" for name in ("a_ptr", "b_ptr", *(f"{name}_q_ptr" for name in QUANTISED))}
MULTIPLIERS = {f"{name}_dq_ptr": "*fp32" for name in ("a", "b", *QUANTISED)}
STRIDES = {f"{operand}_dq_stride_{dim}": "i32" for operand, dim in ("am", "ak", "bn", "bk")}
OTHERS = {"rstd_ptr": "*fp32", "eps": "fp32"}
TYPES = INTS | ONE_BYTE | MULTIPLIERS | STRIDES | OTHERS
GEMM = {"BLOCK_N": 128, "GROUP_M": 8}
CASES = {
    "quantize_1x128": (quantize._quantize_1x128_kernel, {"x_ptr": "*bf16"}, {"POW2": False}, {"num_warps": 8}),
    "quantize_1x128_both": (
        quantize._quantize_1x128_both_kernel,
        {"x_ptr": "*bf16"},
        {"RUN": 8, "PADDED": False, "POW2": False},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "quantize_1x128_both, fp32": (
        quantize._quantize_1x128_both_kernel,
        {"x_ptr": "*fp32"},
        {"RUN": 8, "PADDED": False, "POW2": True},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "quantize_1x128_both, padded": (
        quantize._quantize_1x128_both_kernel,
        {"x_ptr": "*fp32"},
        {"RUN": 4, "PADDED": True, "POW2": True},
        {"num_warps": 8},
    ),
    "quantize_1x128_both, eight warps": (
        quantize._quantize_1x128_both_kernel,
        {"x_ptr": "*bf16"},
        {"RUN": 4, "PADDED": False, "POW2": False},
        {"num_warps": 8},
    ),
    "quantize_1x128_columns": (
        quantize._quantize_columns_kernel,
        {"x_ptr": "*bf16"},
        {"RUN": 8, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "quantize_1x128_columns, eight warps": (
        quantize._quantize_columns_kernel,
        {"x_ptr": "*fp32"},
        {"RUN": 4, "PADDED": False, "POW2": True, "SQUARE": False},
        {"num_warps": 8},
    ),
    "quantize_128x128_columns": (
        quantize._quantize_columns_kernel,
        {"x_ptr": "*bf16"},
        {"RUN": 8, "PADDED": False, "POW2": False, "SQUARE": True},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "quantize_128x128_columns, padded": (
        quantize._quantize_columns_kernel,
        {"x_ptr": "*fp32"},
        {"RUN": 4, "PADDED": True, "POW2": True, "SQUARE": True},
        {"num_warps": 8},
    ),
    "quantize_128x128": (quantize._quantize_128x128_kernel, {"w_ptr": "*fp32"}, {"POW2": False}, {"num_warps": 8}),
    "quantize_128x128, bf16": (
        quantize._quantize_128x128_kernel,
        {"w_ptr": "*bf16"},
        {"POW2": False},
        {"num_warps": 8},
    ),
    "quantize_128x128_both": (
        quantize._quantize_128x128_both_kernel,
        {"w_ptr": "*bf16"},
        {"RUN": 4, "PADDED": False, "POW2": False},
        {"num_warps": 8},
    ),
    "quantize_128x128_both, padded": (
        quantize._quantize_128x128_both_kernel,
        {"w_ptr": "*fp32"},
        {"RUN": 4, "PADDED": True, "POW2": True},
        {"num_warps": 8},
    ),
    "swiglu": (
        producers._quantize_swiglu_kernel,
        {"gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"RUN": 4, "ROWS": True, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 8, "maxnreg": 128},
    ),
    "swiglu_columns": (
        producers._quantize_swiglu_kernel,
        {"gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"RUN": 8, "ROWS": False, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "swiglu_blocks": (
        producers._quantize_swiglu_kernel,
        {"gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"RUN": 8, "ROWS": False, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": True},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "swiglu_backward": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*bf16", "gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"WITH_H": True, "RUN": 4, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 8},
    ),
    "swiglu_backward, gradients alone": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*bf16", "gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"WITH_H": False, "RUN": 4, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 8},
    ),
    "swiglu_backward, of payloads": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*bf16", "gate_ptr": "*fp8e4nv", "up_ptr": "*fp8e4nv"},
        {"WITH_H": True, "RUN": 4, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 8},
    ),
    "swiglu_backward, of payloads, padded": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*fp32", "gate_ptr": "*fp8e4nv", "up_ptr": "*fp8e4nv"},
        {"WITH_H": True, "RUN": 4, "PADDED": True, "POW2": True, "SQUARE": False},
        {"num_warps": 8},
    ),
    "swiglu_backward, h in blocks": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*bf16", "gate_ptr": "*fp8e4nv", "up_ptr": "*fp8e4nv"},
        {"WITH_H": True, "RUN": 4, "PADDED": False, "POW2": False, "SQUARE": True},
        {"num_warps": 8},
    ),
    "swiglu_rows": (
        producers._quantize_swiglu_rows_kernel,
        {"gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"WITH_INPUTS": False, "BLOCK_M": 32, "POW2": False},
        {"num_warps": 8},
    ),
    "swiglu_rows, and inputs": (
        producers._quantize_swiglu_rows_kernel,
        {"gate_ptr": "*bf16", "up_ptr": "*bf16"},
        {"WITH_INPUTS": True, "BLOCK_M": 32, "POW2": False},
        {"num_warps": 8},
    ),
    "swiglu_rows, and inputs, fp32": (
        producers._quantize_swiglu_rows_kernel,
        {"gate_ptr": "*fp32", "up_ptr": "*fp32"},
        {"WITH_INPUTS": True, "BLOCK_M": 32, "POW2": True},
        {"num_warps": 8},
    ),
    "swiglu_backward, padded": (
        producers._quantize_swiglu_gradients_kernel,
        {"dh_ptr": "*fp32", "gate_ptr": "*fp32", "up_ptr": "*fp32"},
        {"WITH_H": True, "RUN": 4, "PADDED": True, "POW2": True, "SQUARE": False},
        {"num_warps": 8},
    ),
    "rms_norm, whole rows": (
        producers._quantize_rms_norm_rows_kernel,
        {"x_ptr": "*bf16", "weight_ptr": "*bf16"},
        {"POW2": False, "BLOCK_M": 2, "BLOCK_K": 4096},
        {"num_warps": 4},
    ),
    "rms_norm, longest rows": (
        producers._quantize_rms_norm_rows_kernel,
        {"x_ptr": "*fp32", "weight_ptr": "*fp32"},
        {"POW2": False, "BLOCK_M": 1, "BLOCK_K": 16384},
        {"num_warps": 8},
    ),
    "rms_norm_rstd": (
        producers._rms_norm_rstd_kernel,
        {"x_ptr": "*fp32"},
        {"BLOCK_M": 4, "BLOCK_K": 2048},
        {"num_warps": 4},
    ),
    "rms_norm": (
        producers._quantize_rms_norm_kernel,
        {"x_ptr": "*bf16", "weight_ptr": "*fp32"},
        {"RUN": 4, "ROWS": True, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 8, "maxnreg": 128},
    ),
    "rms_norm_columns": (
        producers._quantize_rms_norm_kernel,
        {"x_ptr": "*bf16", "weight_ptr": "*fp32"},
        {"RUN": 8, "ROWS": False, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": False},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "rms_norm_blocks": (
        producers._quantize_rms_norm_kernel,
        {"x_ptr": "*bf16", "weight_ptr": "*fp32"},
        {"RUN": 8, "ROWS": False, "COLUMNS": True, "PADDED": False, "POW2": False, "SQUARE": True},
        {"num_warps": 4, "maxnreg": 168},
    ),
    "amax_128x128_": (
        quantize._amax_128x128_kernel,
        {"w_ptr": "*fp32", "bits_ptr": "*i32"},
        {},
        {"num_warps": 4},
    ),
    "quantize_rows": (quantize._quantize_rows_kernel, {"w_ptr": "*fp32"}, {}, {"num_warps": 8}),
    "transpose": (quantize._transpose_kernel, {"x_ptr": "*fp8e4nv", "xt_ptr": "*fp8e4nv"}, {}, {"num_warps": 8}),
    "gemm": (
        gemm._gemm_kernel,
        {"c_ptr": "*bf16"},
        {"B_PER_ROW": False, "WHOLE_K": True, "BLOCK_M": 128} | GEMM,
        {"num_warps": 8},
    ),
    "gemm, per row": (
        gemm._gemm_kernel,
        {"c_ptr": "*fp32"},
        {"B_PER_ROW": True, "WHOLE_K": True, "BLOCK_M": 128} | GEMM,
        {"num_warps": 8},
    ),
    "gemm, ragged K": (
        gemm._gemm_kernel,
        {"c_ptr": "*bf16"},
        {"B_PER_ROW": True, "WHOLE_K": False, "BLOCK_M": 64} | GEMM,
        {"num_warps": 4},
    ),
}


def compile_for(capability, kernel, types, constants, options):
    types = TYPES | types
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert all(name in constants for name, kind in signature.items() if kind == "constexpr"), signature
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    if kernel is gemm._gemm_kernel:
        options = options | {"num_stages": 4 if capability in (90, 100) else 3}
    if "maxnreg" in options and capability != 90:
        if kernel.__module__ == quantize.__name__:
            pytest.skip("launched so on Hopper alone")
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_for_hopper(c_dtype, b_per_row, tiling):
    """gemm_hopper's kernel, as its launcher has it compiled."""

    def descriptor(dtype, shape, layout):
        return f"tensordesc<{dtype}{list(shape)},{layout!r}>"

    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[c_dtype]
    signature = {
        "a_desc": descriptor("fp8e4nv", (64 * tiling.parts, 128), gemm_hopper.E4M3_TILE),
        "b_desc": descriptor("fp8e4nv", (128, 128), gemm_hopper.E4M3_TILE),
        "c_desc": descriptor(name, (64, tiling.c_columns(c_dtype)), tiling.c_layout(c_dtype)),
        "a_dq_desc": descriptor("fp32", (256,), gemm_hopper.FP32_VECTOR),
        "b_dq_desc": descriptor("fp32", (128,), gemm_hopper.FP32_VECTOR) if b_per_row else "constexpr",
        "b_dq_ptr": "*fp32",
        "counter_ptr": "*i32",
        **{size: "i32" for size in ("M", "N", "K", "a_dq_k", "b_dq_n", "b_dq_k")},
        **dict.fromkeys(("B_PER_ROW", "WARPGROUPS", "PARTS", "STAGES"), "constexpr"),
    }
    constants = dict(zip(("B_PER_ROW", "WARPGROUPS", "PARTS", "STAGES"), (b_per_row, *tiling.constants), strict=True))
    constants |= {} if b_per_row else {"b_dq_desc": None}
    names = list(signature)
    source = GluonASTSource(
        gemm_hopper._gemm_hopper_kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {}
    )
    with gemm_hopper.assembler_for(b_per_row):
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=tiling.options)


def compile_both_for_hopper(kernel, types, constants):
    """One of both_hopper's kernels, as its launcher has it compiled."""
    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    names = list(signature)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = GluonASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


def disassembled(compiled, tmp_path, tool, option):
    """The output of a tool that Triton's wheel carries."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def sass_resources(compiled, tmp_path):
    """(registers, bytes of stack)."""
    text = disassembled(compiled, tmp_path, "cuobjdump", "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def uses_of_the_stack_pointer(compiled, tmp_path):
    """R1, which the assembler also names where a value is undefined: by the program, or because it lost the value."""
    lines = disassembled(compiled, tmp_path, "nvdisasm", "-c").splitlines()
    return [line for line in lines if re.search(r"\bR1\b", line)][1:]  # the first sets it


@contextlib.contextmanager
def assembler_log():
    """What ptxas says of a compilation, which is not taken from Triton's cache."""
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield log


def assert_well_assembled(compiled, log, tmp_path):
    """No spills, no undefined values, and no C75xx: the assembler has to wait for each wgmma before it issues the next."""
    stack = sass_resources(compiled, tmp_path)[1]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    assert len(spilled) == 2, f"the log of the assembler has changed its form: {log}"
    assert stack == 0 and not any(spilled) and "C75" not in log, log
    assert not uses_of_the_stack_pointer(compiled, tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_for_every_supported_chip(capability, case, tmp_path):
    with assembler_log() as log:
        compiled = compile_for(capability, *CASES[case])
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert 0 < sass_resources(compiled, tmp_path)[0] <= 255
    if (capability, case) == (100, "gemm, per row"):
        return  # tensor memory of datacenter Blackwell wants a kernel of its own
    assert_well_assembled(compiled, log.getvalue(), tmp_path)


@pytest.mark.parametrize(
    "b_per_row, tiling", [(False, gemm_hopper.LOW), (False, gemm_hopper.HIGH), (True, gemm_hopper.HIGH)]
)
@pytest.mark.parametrize("c_dtype", [torch.bfloat16, torch.float32])
def test_hopper_gemm_is_well_assembled(c_dtype, b_per_row, tiling, tmp_path):
    with assembler_log() as log:
        compiled = compile_for_hopper(c_dtype, b_per_row, tiling)
    assert compiled.metadata.shared <= SHARED_MEMORY[90] * 1024
    assert sass_resources(compiled, tmp_path)[0] <= tiling.registers
    assert_well_assembled(compiled, log.getvalue(), tmp_path)


@pytest.mark.parametrize("with_h, square", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("inputs", ["*bf16", "*fp8e4nv"])
def test_hopper_swiglu_gradients_are_well_assembled(inputs, with_h, square, tmp_path):
    types = {"dh_ptr": "*bf16", "gate_ptr": inputs, "up_ptr": inputs}
    with assembler_log() as log:
        constants = {"WITH_H": with_h, "POW2": False, "SQUARE": square}
        compiled = compile_both_for_hopper(both_hopper._quantize_swiglu_gradients_kernel, types, constants)
    assert_well_assembled(compiled, log.getvalue(), tmp_path)
    assert sass_resources(compiled, tmp_path)[0] <= 128 and 2 * compiled.metadata.shared <= SHARED_MEMORY[90] * 1024
    ptx = compiled.asm["ptx"]
    # Of bf16 a thread loads 16 bytes at a time, of e4m3 eight; and 16 rows of a column are stored at once.
    assert ptx.count("ld.global.v4.b32") == (8 if inputs == "*fp8e4nv" else 24)
    assert ptx.count("st.global.v4.b32") == 4 * (3 if with_h else 2)


@pytest.mark.parametrize("pow2", [False, True])
def test_hopper_quantisation_is_well_assembled(pow2, tmp_path):
    with assembler_log() as log:
        compiled = compile_both_for_hopper(both_hopper._quantize_1x128_both_kernel, {"x_ptr": "*bf16"}, {"POW2": pow2})
    assert_well_assembled(compiled, log.getvalue(), tmp_path)
    # Four programs of eight warps on a multiprocessor.
    assert sass_resources(compiled, tmp_path)[0] <= 64 and 4 * compiled.metadata.shared <= SHARED_MEMORY[90] * 1024
    ptx = compiled.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 8 and ptx.count("st.global.v4.b32") == 4


FURTHER = [Requirement(line) for line in (ROOT / "scripts/tritons.txt").read_text().splitlines() if line[0] != "#"]
FURTHER_VERSIONS = [
    str(requirement.specifier).removeprefix("==")
    for requirement in FURTHER
    if requirement.marker is None or requirement.marker.evaluate()
]


def folder_of(version):
    return Path(sys.prefix) / f"triton-{version}"


def start_with_triton(version):
    """This file's tests of sm_90a, in a process that imports that version."""
    code = "import pytest, sys, triton; assert triton.__version__ == sys.argv[1]; sys.exit(pytest.main(sys.argv[2:]))"
    options = ["-q", "-p", "no:cacheprovider", "-k", "test_hopper or 90-", __file__]
    path = os.pathsep.join([str(folder_of(version)), os.environ.get("PYTHONPATH", "")])
    return start([sys.executable, "-c", code, version, *options], PYTHONPATH=path)


def start(command, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


IN_PROCESSES = {
    "test_kernels_equal_their_twins_in_the_interpreter": lambda: start(
        [sys.executable, "-m", "tests.interpreted"], TRITON_INTERPRET="1"
    ),
    **{
        f"test_compiles_for_hopper_with_other_versions_of_triton[{version}]": functools.partial(
            start_with_triton, version
        )
        for version in FURTHER_VERSIONS
        if folder_of(version).exists()
    },
}


@pytest.fixture(scope="module", autouse=True)
def begun(request):
    """The processes that selected tests wait for, by test: begun first, beside the tests of this one."""
    selected = {item.name for item in request.session.items}
    processes = {name: begin() for name, begin in IN_PROCESSES.items() if name in selected}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("version", FURTHER_VERSIONS)
def test_compiles_for_hopper_with_other_versions_of_triton(version, request, begun):
    if request.node.name not in begun:
        pytest.skip(
            f"Triton {version} is not in {folder_of(version)}: bash scripts/setup_env.sh --tritons puts it there"
        )
    run = begun[request.node.name]
    out, err = run.communicate()
    assert run.returncode == 0 and f"{len(CASES) + 15} passed" in out, out[-5000:] + err[-2000:]


def test_the_oldest_supported_triton_is_compiled_for():
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'"triton>=([\d.]+)', project)[1]
    assert any(version == oldest or version.startswith(f"{oldest}.") for version in FURTHER_VERSIONS)


def test_hopper_runs_on_its_own_matrix_instructions():
    ptx = compile_for(90, *CASES["gemm"]).asm["ptx"]
    assert "wgmma.mma_async" in ptx and "e4m3.e4m3" in ptx


def test_kernels_equal_their_twins_in_the_interpreter(request, begun):
    run = begun[request.node.name]
    out, err = run.communicate()
    assert run.returncode == 0 and out.endswith("all equal\n"), err[-3000:]


def test_no_kernel_that_packs_columns_is_compiled_for_a_single_row():
    """The rows past it would be constants, whose casts the assembler loses."""
    packing = {case[0] for case in CASES.values() if "PADDED" in case[0].arg_names}
    assert len(packing) == 6
    for kernel in packing:
        rows = next(parameter for parameter in kernel.params if parameter.name in ("M", "N"))
        assert rows.do_not_specialize, kernel
