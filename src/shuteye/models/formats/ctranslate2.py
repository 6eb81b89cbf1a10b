"""CTranslate2's Whisper checkpoints (`model.bin` of format 6, float) → a checkpoint in Hugging Face format.

A pure reader: CTranslate2 itself is not needed. The format is that of ctranslate2/specs/model_spec.py:

    u32 version, string spec name, u32 spec revision
    u32 number of variables; each: string name, u8 rank, u32 shape[rank], u8 dtype, u32 nbytes, bytes
    u32 number of aliases; each: string alias, string name        string: u16 length, bytes, the last of which is 0
"""

from __future__ import annotations

import json
import mmap
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shuteye.errors import UnsupportedModel

FORMAT_VERSION = 6
SPEC = "WhisperSpec"

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = {0: "relu", 1: "gelu_new", 2: "silu", 3: "gelu", 4: "quick_gelu"}

_TOP = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
}
_POSITIONS = "{side}/position_encodings/encodings"
_EMBEDDINGS = "decoder/embeddings/weight"
_TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")
_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


@dataclass(frozen=True, slots=True)
class Variables:
    """What a `model.bin` holds; tensors are views of the file, so that only what is used is read."""

    path: Path
    tensors: Mapping[str, torch.Tensor]

    def get(self, name: str) -> torch.Tensor:
        """A float tensor of any precision, as float32.

        Raises:
            UnsupportedModel: there is none of that name, or it is quantized.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UnsupportedModel(f"{self.path} has no variable {name!r}, which a Whisper model needs.")
        if tensor.dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{self.path}: {name!r} is quantized ({str(tensor.dtype).removeprefix('torch.')}), which is not read; "
                "convert the original checkpoint again with --quantization float16."
            )
        return tensor.float()

    def scalar(self, name: str, default: int) -> int:
        """A whole number stored as a variable."""
        tensor = self.tensors.get(name)
        return default if tensor is None else int(tensor)

    def num_layers(self, side: str) -> int:
        """How many layers the encoder or the decoder has."""
        return len({name.split("/")[1] for name in self.tensors if name.startswith(f"{side}/layer_") and "." not in name
                    and name.split("/")[1] != "layer_norm"})  # fmt: skip


def read_variables(path: Path) -> Variables:
    """Parse a `model.bin`.

    Raises:
        UnsupportedModel: it is cut off, or of another format version or kind of model.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that could be written
        return Variables(path, _Parser(path, buffer).parse())
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise UnsupportedModel(f"{path} is no complete CTranslate2 model: {error}") from error


class _Parser:
    """Reads one `model.bin` from front to back."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._offset = 0

    def parse(self) -> dict[str, torch.Tensor]:
        version = self._number("I")
        if version != FORMAT_VERSION:
            raise UnsupportedModel(f"{self._path} has format version {version}; {FORMAT_VERSION} is read.")
        spec = self._string()
        if spec != SPEC:
            raise UnsupportedModel(f"{self._path} holds a {spec}; only a {SPEC} is read.")
        self._number("I")  # revision of the spec
        tensors = dict(self._variable() for _ in range(self._number("I")))
        for _ in range(self._number("I")):
            alias, name = self._string(), self._string()
            tensors[alias] = tensors[name]
        return tensors

    def _variable(self) -> tuple[str, torch.Tensor]:
        name = self._string()
        shape = [self._number("I") for _ in range(self._number("B"))]
        code = self._number("B")
        if code not in _DTYPES:
            raise ValueError(f"{name!r} has a dtype of code {code}, known are {sorted(_DTYPES)}")
        dtype = _DTYPES[code]
        nbytes = self._number("I")
        expected = torch.Size(shape).numel() * dtype.itemsize
        if nbytes != expected or self._offset + nbytes > len(self._buffer):
            raise ValueError(f"{name!r} has {nbytes} bytes at {self._offset}, expected {expected} inside of the file")
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=self._offset).reshape(shape)
        self._offset += nbytes
        return name, tensor

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self._buffer, self._offset)
        self._offset += struct.calcsize(code)
        return int(value)

    def _string(self) -> str:
        length = self._number("H")
        raw = self._buffer[self._offset : self._offset + length]
        if len(raw) < length:
            raise ValueError(f"a name of {length} bytes at {self._offset} ends after {len(raw)}")
        self._offset += length
        return raw[:-1].decode()


# --- names --------------------------------------------------------------------------------------


def whisper_tensors(variables: Variables) -> dict[str, torch.Tensor]:
    """The parameters of transformers' WhisperForConditionalGeneration, in float32; tied ones only once."""
    found: dict[str, torch.Tensor] = {"model.decoder.embed_tokens.weight": variables.get(_EMBEDDINGS)}
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = variables.get(_POSITIONS.format(side=side))
        for index in range(variables.num_layers(side)):
            found |= _layer(variables, f"{side}/layer_{index}", f"model.{side}.layers.{index}")
    for old, new in _TOP.items():
        found |= _module(variables, old, new)
    return found


def _layer(variables: Variables, old: str, new: str) -> dict[str, torch.Tensor]:
    found = _self_attention(variables, f"{old}/self_attention", f"{new}.self_attn")
    found |= _module(variables, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    if f"{old}/attention/linear_0/weight" in variables.tensors:
        found |= _cross_attention(variables, f"{old}/attention", f"{new}.encoder_attn")
        found |= _module(variables, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
    found |= _module(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    found |= _module(variables, f"{old}/ffn/linear_0", f"{new}.fc1")
    return found | _module(variables, f"{old}/ffn/linear_1", f"{new}.fc2")


def _self_attention(variables: Variables, old: str, new: str) -> dict[str, torch.Tensor]:
    """`linear_0` is the rows of query, key and value, one below the other."""
    found = _split(variables, f"{old}/linear_0", [f"{new}.q_proj", f"{new}.k_proj", f"{new}.v_proj"])
    return found | _module(variables, f"{old}/linear_1", f"{new}.out_proj")


def _cross_attention(variables: Variables, old: str, new: str) -> dict[str, torch.Tensor]:
    """`linear_0` is the query, `linear_1` key and value."""
    found = _module(variables, f"{old}/linear_0", f"{new}.q_proj")
    found |= _split(variables, f"{old}/linear_1", [f"{new}.k_proj", f"{new}.v_proj"])
    return found | _module(variables, f"{old}/linear_2", f"{new}.out_proj")


def _split(variables: Variables, old: str, modules: list[str]) -> dict[str, torch.Tensor]:
    """A fused projection's parts; Whisper's keys have no bias, so theirs must be zero."""
    weights = variables.get(f"{old}/weight").chunk(len(modules))
    biases = variables.get(f"{old}/bias").chunk(len(modules))
    found: dict[str, torch.Tensor] = {}
    for module, weight, bias in zip(modules, weights, biases, strict=True):
        found[f"{module}.weight"] = weight
        if not module.endswith(".k_proj"):
            found[f"{module}.bias"] = bias
        elif bool(bias.any()):
            raise UnsupportedModel(f"{variables.path}: {old} has a bias for its keys, which Whisper does not have.")
    return found


def _module(variables: Variables, old: str, new: str) -> dict[str, torch.Tensor]:
    """Weight and bias of one linear, convolution or norm."""
    names = {leaf: f"{old}/{leaf}" for leaf in _LEAVES if f"{old}/{leaf}" in variables.tensors}
    if len(names) != 2:
        raise UnsupportedModel(f"{variables.path} has no complete {old!r}, which a Whisper model needs.")
    return {f"{new}.{_LEAVES[leaf]}": variables.get(name) for leaf, name in names.items()}


# --- a whole checkpoint -------------------------------------------------------------------------


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint of a CTranslate2 directory to `target`, a directory that does not exist yet.

    `source` holds model.bin, config.json (which tokens are suppressed), vocabulary.txt and tokenizer.json. Weights are
    stored in float32, which every value of model.bin fits into exactly.

    Raises:
        UnsupportedModel: the model is quantized, of another kind, or does not agree with its tokenizer.
    """
    from safetensors.torch import save_file

    variables = read_variables(source / "model.bin")
    tensors = whisper_tensors(variables)
    tokens = _Tokens.of(source, vocab_size=tensors["model.decoder.embed_tokens.weight"].shape[0])
    settings = json.loads((source / "config.json").read_text())
    target.mkdir(parents=True)
    config, generation = _config(variables, tensors, tokens), _generation_config(tensors, tokens, settings)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", {"feature_extractor_type": "WhisperFeatureExtractor",
                                      "feature_size": config["num_mel_bins"]}),
        ("tokenizer_config.json", tokens.config()),
    ):  # fmt: skip
        (target / name).write_text(json.dumps(content, indent=2))
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The special tokens of a Whisper tokenizer, by their spelling."""

    ids: Mapping[str, int]

    @classmethod
    def of(cls, directory: Path, *, vocab_size: int) -> _Tokens:
        """Read tokenizer.json and hold it against vocabulary.txt, which names every row of the embedding.

        Tokenizers may lack the timestamps, which are the last rows.
        """
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        rows = (directory / "vocabulary.txt").read_text().rstrip("\n").split("\n")
        if len(rows) != vocab_size:
            raise UnsupportedModel(f"{directory}: vocabulary.txt has {len(rows)} tokens, the embedding {vocab_size}.")
        known = tokenizer["model"]["vocab"] | added
        astray = [token for token, index in known.items() if index >= vocab_size or rows[index] != token]
        beyond = [row for row in rows[len(set(known.values())) :] if not _TIMESTAMP.fullmatch(row)]
        if astray or beyond:
            raise UnsupportedModel(
                f"{directory}: tokenizer.json and vocabulary.txt disagree about {(astray + beyond)[0]!r}, so one of "
                "them belongs to another model."
            )
        return cls(added)

    def __getitem__(self, spelling: str) -> int:
        if spelling not in self.ids:
            raise UnsupportedModel(f"The tokenizer has no {spelling}, so it is not one of Whisper's.")
        return self.ids[spelling]

    @property
    def multilingual(self) -> bool:
        """English-only tokenizers have one token less before `<|endoftext|>`."""
        return self["<|endoftext|>"] != 50256

    @property
    def languages(self) -> dict[str, int]:
        """Language tokens, which stand between `<|startoftranscript|>` and `<|translate|>`."""
        between = range(self["<|startoftranscript|>"] + 1, self["<|translate|>"])
        return {spelling: index for spelling, index in self.ids.items() if index in between}

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        end = "<|endoftext|>"
        return {"tokenizer_class": "WhisperTokenizer", "bos_token": end, "eos_token": end, "unk_token": end,
                "pad_token": end, "model_max_length": 1024, "errors": "replace"}  # fmt: skip


def _config(variables: Variables, tensors: Mapping[str, torch.Tensor], tokens: _Tokens) -> dict[str, Any]:
    vocab_size, d_model = tensors["model.decoder.embed_tokens.weight"].shape
    end = tokens["<|endoftext|>"]
    activation = variables.scalar("decoder/activation", default=3)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"{variables.path} uses activation {activation}, which is not known.")
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "encoder_layers": variables.num_layers("encoder"),
        "decoder_layers": variables.num_layers("decoder"),
        "encoder_attention_heads": variables.scalar("encoder/num_heads", default=d_model // 64),
        "decoder_attention_heads": variables.scalar("decoder/num_heads", default=d_model // 64),
        "encoder_ffn_dim": tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": tensors["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "activation_function": _ACTIVATIONS[activation],
        "scale_embedding": bool(variables.scalar("decoder/scale_embeddings", default=0)),
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _generation_config(
    tensors: Mapping[str, torch.Tensor], tokens: _Tokens, settings: Mapping[str, Any]
) -> dict[str, Any]:
    end = tokens["<|endoftext|>"]
    generation: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "prev_sot_token_id": tokens["<|startofprev|>"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "alignment_heads": settings["alignment_heads"],
        "max_initial_timestamp_index": 50,
        "max_length": tensors["model.decoder.embed_positions.weight"].shape[0],
        "is_multilingual": tokens.multilingual,
        "return_timestamps": False,
    }
    if tokens.multilingual:
        generation["lang_to_id"] = tokens.languages
        generation["task_to_id"] = {"transcribe": tokens["<|transcribe|>"], "translate": tokens["<|translate|>"]}
    return generation
