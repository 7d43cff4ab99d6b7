"""From a GGUF file to a module of `transformers`, each tensor accounted for.

    model = load_gguf_model("SmolLM2-135M-Instruct.Q4_1.gguf")

The configuration and the names of tensors are translated by `transformers`; the file's header is
checked first (`accel.frontends.gguf`), then names and sizes against the model's own on the meta
device, and only then memory is taken. Encoded tensors are decoded to the model's dtype: decoding
is exact in float32, and passes such as `quantize` encode again in a format that accel has kernels
for.
"""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import InputError
from accel.frontends.gguf import GgufFile, decode_tensor, read_gguf
from accel.frontends.gguf_config import read_config

_ROPE_FACTORS = "rope_freqs.weight"
_MOST_NAMES = 4


def load_gguf_model(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of a GGUF file, in evaluation mode.

    Raises InputError for a damaged file, an architecture that `transformers` does not know, and
    tensors that are missing, superfluous or of another size than the model's, by name.
    """
    path = Path(path)
    file = read_gguf(path)
    _check_plausible(file)
    transformers = importlib.import_module("transformers")
    try:
        config = read_config(file)
        with torch.device("meta"):
            shell = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a strange configuration makes of foreign code
        raise InputError(
            f"the GGUF file describes no model that transformers can build: {error}",
            where=str(path),
        ) from error
    translator = _Translator(file, shell, config)
    translator.check()
    model = type(shell).from_pretrained(
        None, config=config, state_dict=translator.tensors(dtype), dtype=dtype
    )
    _divide_frequencies(file, model)
    return model.eval()


def _check_plausible(file: GgufFile) -> None:
    """What would take memory or time before tensors are compared: layers and experts."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise file.fail("'general.architecture' is missing")
    for key, most in (("block_count", len(file.tensors)), ("expert_count", 4096)):
        value = file.metadata.get(f"{architecture}.{key}", 1)
        if type(value) is not int or not 0 <= value <= most:
            raise file.fail(f"'{architecture}.{key}' is {str(value)[:40]}; {most} is the most")


class _Translator:
    """Tensors of a file under the names, and in the shapes, of a model's parameters."""

    def __init__(self, file: GgufFile, shell: nn.Module, config: Any) -> None:
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        self.file, self.shell = file, shell
        architecture = file.metadata["general.architecture"]
        kind = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
        self.processor = kind(config=config.to_dict())
        self.names = self._names(architecture, config)
        self.sizes = {n: math.prod(p.shape) for n, p in shell.state_dict(keep_vars=True).items()}

    def _names(self, architecture: str, config: Any) -> dict[str, str]:
        """The file's name for each parameter -> the parameter's own."""
        constants = importlib.import_module("gguf.constants")
        kinds = {name: kind for kind, name in constants.MODEL_ARCH_NAMES.items()}
        if architecture not in kinds:
            raise InputError(
                f"the package gguf knows no architecture '{architecture[:80]}'",
                where=str(self.file.path),
            )
        table = importlib.import_module("gguf.tensor_mapping").get_tensor_name_map(
            kinds[architecture], config.num_hidden_layers
        )
        prefix = f"{self.shell.base_model_prefix}."
        names: dict[str, str] = {}
        for parameter in self.shell.state_dict(keep_vars=True):
            wanted = self.processor.preprocess_name(parameter)
            stem, dot, last = wanted.rpartition(".")
            name, suffix = (stem, dot + last) if last in ("weight", "bias") else (wanted, "")
            # Some files were made of the model without its head: names lack the prefix.
            found = table.get_name(name) or table.get_name(name.removeprefix(prefix))
            if found is None:
                self.processor.perform_fallback_tensor_mapping(names, suffix, "", wanted)
            else:
                names.setdefault(found + suffix, wanted)
        return names

    def check(self) -> None:
        """Missing, superfluous and mis-shaped tensors, by name."""
        tied = getattr(self.shell, "_tied_weights_keys", None) or {}
        given = {self.names[n] for n in self.file.tensors if n in self.names}
        wrong = []
        for name, wanted in self.names.items():
            if name not in self.file.tensors and wanted not in given and wanted not in tied:
                wrong.append(f"'{name}' is missing")
        found: dict[str, int] = {}
        for name, tensor in self.file.tensors.items():
            if name == _ROPE_FACTORS:
                continue
            if name not in self.names:
                wrong.append(f"'{name}' {list(tensor.shape)} belongs to no part of the model")
                continue
            wanted = self.names[name]
            found[wanted] = found.get(wanted, 0) + math.prod(tensor.shape)
            # Where several tensors make one parameter, their sizes are summed.
            if found[wanted] > self.sizes[wanted] or not _alike(tensor.shape, self._shape(wanted)):
                wrong.append(
                    f"'{name}' is {list(tensor.shape)} where {list(self._shape(wanted))} is needed"
                )
        wrong += [
            f"'{name}' has {found[name]} of {self.sizes[name]} values"
            for name in found
            if found[name] < self.sizes[name] and not any(f"'{name}'" in w for w in wrong)
        ]
        if wrong:
            more = f", and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
            raise InputError(
                "the tensors of the GGUF file do not fit its model: "
                + "; ".join(wrong[:_MOST_NAMES])
                + more,
                where=str(self.file.path),
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shell.state_dict(keep_vars=True)[name].shape)

    def tensors(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """All parameters, decoded one after the other."""
        made: dict[str, Any] = {"tensors": {}, "config": {}}
        with (
            self.file.path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            for name, tensor in self.file.tensors.items():
                if name == _ROPE_FACTORS:
                    continue
                result = self.processor.process(
                    weights=decode_tensor(tensor, data).numpy(),
                    name=name,
                    tensor_key_mapping=self.names,
                    parsed_parameters=made,
                )
                if result.name is not None:  # else the processor has stored it itself
                    values = torch.from_numpy(result.weights.copy())
                    made["tensors"][self.names[result.name]] = values.to(dtype)
        tensors: dict[str, Tensor] = made["tensors"]
        return tensors


def _alike(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal up to transposition and sizes of 1; experts are merged, so rank 3 is left to sizes."""
    if len(wanted) > 2:
        return True
    return sorted(d for d in shape if d != 1) == sorted(d for d in wanted if d != 1)


def _divide_frequencies(file: GgufFile, model: nn.Module) -> None:
    """Rotary frequencies scaled one by one (Llama 3): the file stores what divides them."""
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is None:
        return
    with (
        file.path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        values = decode_tensor(factors, data).to(torch.float32)
    found = (getattr(m, "inv_freq", None) for m in model.modules())
    frequencies = [f for f in found if isinstance(f, Tensor)]
    for frequency in frequencies:
        if frequency.shape != values.shape:
            raise InputError(
                f"'{_ROPE_FACTORS}' has {values.numel()} values for {frequency.numel()} "
                "frequencies",
                where=str(file.path),
            )
        frequency.div_(values)
    if not frequencies:
        raise InputError(
            f"'{_ROPE_FACTORS}' is there, and the model has no rotary positions",
            where=str(file.path),
        )
