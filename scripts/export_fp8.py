"""Export a Llama 3 for inference: Hugging Face safetensors whose converted Linears are blockwise fp8.

    python scripts/export_fp8.py --job.config_file configs/llama3_8b_blockwise_fp8.toml \\
        --checkpoint outputs/llama3_8b_blockwise_fp8/checkpoint/step-1000 --out exports/llama3_8b_fp8

reads a torchtitan checkpoint, or a folder of Hugging Face safetensors in bf16 or fp32, tensor by tensor. The job's rules say which
Linears are quantised; all other tensors are written in bf16. What vLLM, SGLang and transformers load as `quant_method = "fp8"`:

    NAME.weight            [N, K] float8_e4m3fn
    NAME.weight_scale_inv  [ceil(N/128), ceil(K/128)] fp32

with w ~= weight * weight_scale_inv per block of 128x128: in spite of its name, which is DeepSeek-V3's, the multiplier that
dequantises. Needs `pip install '.[export]'`. Exits with 2 for an error; nothing is left behind then.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import Checkpoint, HuggingFaceCheckpoint, open_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from blockfp8_titan import ops
from blockfp8_titan.conversion import ConversionReport
from blockfp8_titan.formats import BLOCK, ceil_div
from blockfp8_titan.plan import build_on_meta, plan, quiet_torchtitan, read_job_config
from blockfp8_titan.recipe import ScaleFormat

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Inference engines multiply these as one matrix, which is in fp8 as a whole or not at all.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
BESIDE_THE_WEIGHTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model and what becomes of it."""

    fqn: str
    """torchtitan's name."""
    key: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    """The same under both names."""
    is_linear: bool
    scale_format: ScaleFormat | None
    """How to quantise it; None writes bf16."""
    remark: str = ""
    """Why it stays in bf16 although the job computes with it in fp8."""

    @property
    def module(self) -> str:
        """Hugging Face's name of the module that holds it."""
        return self.key.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Bytes of what is written for it."""
        if self.scale_format is None:
            return torch.Size(self.shape).numel() * torch.bfloat16.itemsize
        n, k = self.shape
        return n * k + ceil_div(n, BLOCK) * ceil_div(k, BLOCK) * torch.float32.itemsize


def decide(report: ConversionReport, shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]) -> list[Parameter]:
    """What becomes of each parameter: as the job's rules say, as far as inference engines can load it.

    They keep the output head in bf16, quantise the parts of a fused matrix (q, k, v; gate, up) alike, and cut only multiples
    of 128 into blocks: vLLM and SGLang refuse other sizes in fused matrices, transformers derives wrong blocks from them.

    Args:
        report: of the job's model.
        shapes: FQN -> shape of every parameter.
        keys: FQN -> Hugging Face's key.
    """
    rows = {f"{row.fqn}.weight": row for row in report.rows}
    parameters = []
    for fqn, shape in shapes.items():
        row = rows.get(fqn)
        parameter = Parameter(fqn, keys[fqn], shape, row is not None, None)
        if row is not None and row.in_fp8:
            assert row.recipe is not None
            if not parameter.key.startswith("model.layers."):
                parameter = replace(parameter, remark="inference engines keep Linears outside the blocks in bf16")
            elif any(size % BLOCK for size in shape):
                parameter = replace(parameter, remark=f"{shape[0]} x {shape[1]} is no multiple of {BLOCK} x {BLOCK}")
            else:
                parameter = replace(parameter, scale_format=row.recipe.scale_format)
        parameters.append(parameter)
    quantised = {parameter.module for parameter in parameters if parameter.scale_format is not None}
    return [_like_its_group(parameter, quantised) for parameter in parameters]


def _like_its_group(parameter: Parameter, quantised: set[str]) -> Parameter:
    """In bf16 where a part of the same fused matrix is."""
    parent, _, name = parameter.module.rpartition(".")
    if parameter.scale_format is not None:
        for group in FUSED:
            others = [other for other in group if name in group and f"{parent}.{other}" not in quantised]
            if others:
                remark = f"fused with {', '.join(others)} by inference engines, which the rules or sizes keep in bf16"
                return replace(parameter, scale_format=None, remark=remark)
    return parameter


def check(parameters: Sequence[Parameter], checkpoint: Checkpoint) -> None:
    """Compare names, shapes and dtypes with what the checkpoint holds, before anything is read.

    Raises:
        ValueError: names the folder, the key and what differs.
    """
    folder = checkpoint.folder
    for parameter in parameters:
        found = checkpoint.stored(parameter)
        if found is None:
            raise ValueError(f"{folder}: has no {parameter.fqn} ({parameter.key}); is it of another model.flavor?")
        shape, dtype = found
        if shape != parameter.shape:
            raise ValueError(
                f"{folder}: {parameter.fqn} ({parameter.key}) has shape {list(shape)}, the job's model {list(parameter.shape)}; "
                "choose its model.flavor"
            )
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{folder}: {parameter.fqn} ({parameter.key}) is stored as {dtype}: must not be quantised already"
            )
    unknown = checkpoint.unknown_keys(parameters)
    if unknown:
        raise ValueError(f"{folder}: holds {unknown[0]}, which the job's model does not have; choose its model.flavor")
    if not any(parameter.scale_format for parameter in parameters):
        remarks = sorted({parameter.remark for parameter in parameters if parameter.remark})
        raise ValueError(f"no weight would be in fp8: {'; '.join(remarks) or 'the rules convert no Linear'}")


def llama_config(args: TransformerModelArgs, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a torchtitan Llama 3, rotary scaling as torchtitan computes it."""
    scaling = args.rope_scaling_args
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def config_of(
    checkpoint: Checkpoint,
    assets: Path,
    args: TransformerModelArgs,
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Iterable[Parameter],
) -> dict[str, Any]:
    """config.json of the export.

    Safetensors with a config.json of their own keep it. Otherwise the model's arguments say how it computes, and config.json or
    the tokenizer among the job's assets what else there is: token ids, the longest context.

    Raises:
        ValueError: a config.json is no JSON, is not of a Llama, is quantised already, or has other sizes than the job's model.
    """
    own = llama_config(args, shapes)
    kept = isinstance(checkpoint, HuggingFaceCheckpoint) and (checkpoint.folder / "config.json").is_file()
    path = (checkpoint.folder if kept else assets) / "config.json"
    base = _read_json(path)
    for key in ("model_type", *SIZES):
        if base.get(key, own[key]) != own[key]:
            raise ValueError(
                f"{path}: {key} = {base[key]!r}, but the job's model has {own[key]!r}; choose its model.flavor"
            )
    if kept and "quantization_config" in base:
        raise ValueError(f"{path}: has a quantization_config: export from weights that are not quantised")
    if kept:
        config = base
    else:
        base.pop("rope_parameters", None)
        context = {"max_position_embeddings": args.max_seq_len}
        config = context | _token_ids(assets) | base | own
    in_bf16 = [p.module for p in parameters if p.is_linear and p.scale_format is None]
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": in_bf16,
        "ignored_layers": in_bf16,  # the same in vLLM's words, which its older versions do not translate
    }
    config.pop("dtype", None)
    return config | {"torch_dtype": "bfloat16", "quantization_config": quantization}


def _token_ids(assets: Path) -> dict[str, int | None]:
    """bos_token_id and eos_token_id by the tokenizer's files; None where they do not tell."""
    vocabulary = _read_json(assets / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in vocabulary}
    names = _read_json(assets / "tokenizer_config.json")
    found = {}
    for name in ("bos_token", "eos_token"):
        token = names.get(name)
        found[f"{name}_id"] = ids.get(token["content"] if isinstance(token, dict) else token)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def encode(parameter: Parameter, checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """Read a parameter; the tensors to write for it, on the CPU.

    Quantised from the stored precision: from fp32 masters with one rounding.

    Raises:
        ValueError: it cannot be read, or holds NaN or Inf.
    """
    value = checkpoint.read(parameter).to(device)
    if parameter.scale_format is None:
        value = value.to(torch.bfloat16)
        finite, encoded = value.isfinite().all(), {parameter.key: value}
    else:
        if value.dtype not in (torch.bfloat16, torch.float32):
            value = value.float()
        w_q, w_dq = ops.quantize_128x128(value, parameter.scale_format)
        finite, encoded = w_dq.isfinite().all(), {parameter.key: w_q, f"{parameter.key}_scale_inv": w_dq}
    if not finite:
        raise ValueError(
            f"{checkpoint.folder}: {parameter.fqn} ({parameter.key}) holds NaN or Inf: export an earlier step"
        )
    return {key: tensor.cpu().contiguous() for key, tensor in encoded.items()}


def into_files(parameters: Iterable[Parameter], shard_bytes: int) -> list[list[Parameter]]:
    """Parameters in the order given, cut into files of at most so many bytes, or of one parameter where it alone is larger."""
    files: list[list[Parameter]] = [[]]
    room = shard_bytes
    for parameter in parameters:
        if parameter.size > room and files[-1]:
            files.append([])
            room = shard_bytes
        files[-1].append(parameter)
        room -= parameter.size
    return files


def write_weights(
    folder: Path, parameters: Sequence[Parameter], checkpoint: Checkpoint, device: torch.device, shard_bytes: int
) -> None:
    """model-0000i-of-0000n.safetensors and their index; at most one file's tensors are in memory, and one being read."""
    files = into_files(parameters, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for parameter in members:
            tensors |= encode(parameter, checkpoint, device)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o666 & ~_umask())  # save_file's are the owner's alone, and a server may be another user
        weight_map |= dict.fromkeys(tensors, name)
        print(f"{name}: {len(tensors)} tensors", flush=True)
    total = sum(parameter.size for parameter in parameters)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _umask() -> int:
    """What the process takes from a new file's permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside this one that takes its place when all is written, and is gone when anything fails.

    Raises:
        ValueError: the folder exists and may not be overwritten, or is no earlier export.
    """
    if folder.exists() and not overwrite:
        raise ValueError(f"--out {folder}: exists already; name another folder or pass --overwrite")
    if folder.exists() and "quantization_config" not in _read_json(folder / "config.json"):
        raise ValueError(
            f"--out {folder}: is no earlier export (its config.json has no quantization_config): remove it by hand"
        )
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            replaced = staging.with_suffix(".replaced")
            folder.rename(replaced)
            staging.rename(folder)
            shutil.rmtree(replaced)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def export(
    job_config: JobConfig,
    source: Path,
    out: Path,
    *,
    device: torch.device,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> list[Parameter]:
    """Write the export of a job's weights.

    Args:
        job_config: of the job that trained them; its rules decide what is quantised, `model.hf_assets_path` has the tokenizer.
        source: a torchtitan checkpoint's folder, or one with Hugging Face safetensors.
        out: the folder to make; it appears when it is complete.
        device: quantises.
        shard_bytes: most bytes of a file.
    Returns:
        What became of each parameter.
    Raises:
        ValueError, OSError: names the file, the key or the argument.
    """
    job_config = copy.deepcopy(job_config)
    # How the job ran: neither bears on what is written, and this machine's torch may not be able to.
    job_config.compile.enable = False
    job_config.parallelism.tensor_parallel_degree = 1
    name = job_config.model.name
    spec = get_train_spec(name)
    model = build_on_meta(job_config)
    args = spec.model_args[job_config.model.flavor]
    if not isinstance(args, TransformerModelArgs):
        raise ValueError(f"model.name = {name!r}: only Llama 3 is exported")
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out}: holds the checkpoint to export")
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
    adapter = spec.state_dict_adapter(args, None)
    keys = {fqn: next(iter(adapter.to_hf({fqn: parameter}))) for fqn, parameter in model.named_parameters()}
    parameters = decide(plan(job_config, model), shapes, keys)
    checkpoint = open_checkpoint(source, adapter)
    check(parameters, checkpoint)
    assets = Path(job_config.model.hf_assets_path)
    config = config_of(checkpoint, assets, args, shapes, parameters)
    with replacing(out, overwrite) as staging:
        write_weights(staging, parameters, checkpoint, device, shard_bytes)
        _write_json(staging / "config.json", config)
        for file in BESIDE_THE_WEIGHTS:
            for folder in (source, assets):
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, staging / file)
                    break
    return parameters


def summary(parameters: Sequence[Parameter], out: Path) -> str:
    """What was written, and which Linears the job computes in fp8 but the export has in bf16."""
    quantised = [parameter for parameter in parameters if parameter.scale_format is not None]
    size = sum(parameter.size for parameter in parameters)
    lines = [
        f"{out}: {len(quantised)} weights in fp8, {len(parameters) - len(quantised)} tensors in bf16, {size / 1e9:.3f} GB"
    ]
    remarks: dict[str, list[str]] = {}
    for parameter in parameters:
        if parameter.remark:
            remarks.setdefault(parameter.remark, []).append(parameter.module)
    for remark, modules in remarks.items():
        others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"in bf16: {modules[0]}{others}: {remark}")
    if not (out / "tokenizer.json").is_file() and not (out / "tokenizer.model").is_file():
        lines.append("no tokenizer was found beside the weights or in model.hf_assets_path: copy it by hand")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are torchtitan's: --job.config_file FILE and any override, such as --model.flavor=70B.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="the weights to export")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="quantises (default: %(default)s)")
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="most of a file, in GB (default: %(default)s)"
    )
    options, torchtitan_args = parser.parse_known_args(arguments)
    if not 0 < options.shard_gb < math.inf:
        parser.error(f"--shard-gb {options.shard_gb}: must be a number above 0")
    try:
        with quiet_torchtitan():
            job_config = read_job_config(torchtitan_args)
            parameters = export(
                job_config,
                options.checkpoint,
                options.out,
                device=torch.device(options.device),
                shard_bytes=int(options.shard_gb * 1e9),
                overwrite=options.overwrite,
            )
        print(summary(parameters, options.out))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
