"""What tests need: tiny random checkpoints, and memory that shows whether it was rewritten.

Shipped, so that plug-in authors can test too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shuteye.memory.backends.fake import POISON

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NUM_BYTES = 256
MIN_VOCAB_SIZE = _NUM_BYTES + len(_SPECIAL_TOKENS)


def poison(tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor's memory with `POISON`."""
    tensor.detach().view(-1).view(torch.uint8).fill_(POISON)


def tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    vocab_size: int = 320,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a tiny checkpoint with random weights, a byte-level tokenizer and a chat template; under a second.

    Args:
        path: directory to make.
        architecture: a transformers model type: "llama", "qwen2", "qwen3", "mistral", …
        config: anything else for the model's config.

    Returns:
        `path`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from shuteye.models.modules import quiet

    path = Path(path)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,  # wide enough for clear winners among the logits
        "tie_word_embeddings": True,
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings | config), dtype=dtype)
        _randomize_vectors(model)
        model.save_pretrained(path)
    write_tiny_tokenizer(path, vocab_size=vocab_size)
    return path


def tiny_encoder(
    path: str | Path,
    *,
    task: str = "embed",
    seed: int = 0,
    architecture: str = "bert",
    pooling: str | None = "mean",
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a tiny checkpoint of a model that embeds, with sentence-transformers' files, that scores, or classifies.

    Args:
        path: directory to make.
        task: "embed", "score" or "classify"; the classes are "calm" and "loud" unless `config` names others.
        architecture: a transformers model type: "bert", "roberta", "distilbert", "mpnet", "modernbert", …
        pooling: sentence-transformers' name of it; None leaves its files out.
        config: anything else for the model's config.

    Returns:
        `path`.
    """
    from transformers import AutoConfig

    from shuteye.models.modules import model_class, model_options, quiet

    path = Path(path)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 130,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # wide enough for different texts to differ
    }
    if task == "score":
        settings |= {"num_labels": 1}
    elif task == "classify":
        settings |= {"id2label": {0: "calm", 1: "loud"}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(architecture, **settings | config)
        found = model_class(made, task)
        model = found._from_config(made, dtype=dtype, **model_options(found, task))
        _randomize_vectors(model)
        model.save_pretrained(path)
    write_tiny_tokenizer(path, vocab_size=settings["vocab_size"], pairs=True)
    _edit_json(
        path / "tokenizer_config.json",
        model_max_length=128,
        model_input_names=["input_ids", *(["token_type_ids"] if architecture == "bert" else []), "attention_mask"],
    )
    if task == "embed" and pooling is not None:
        _write_sentence_files(path, pooling=pooling, normalize=normalize, size=made.hidden_size)
    return path


def _edit_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=2))


def _write_sentence_files(path: Path, *, pooling: str, normalize: bool, size: int) -> None:
    """modules.json and what it names, as sentence-transformers wrote them for most published checkpoints."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules, indent=2))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": False}))
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    settings = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": size, **settings}))
    if normalize:
        (path / "2_Normalize").mkdir()


def tiny_speech_model(path: str | Path, *, seed: int = 0, multilingual: bool = False, **config: Any) -> Path:
    """Write a tiny Whisper with random weights that encodes one second at a time; under a second.

    Its tokenizer knows bytes, then the special tokens in Whisper's order, then timestamps up to 1.00 s.

    Args:
        path: directory to make.
        multilingual: know English, German and French; otherwise English alone.
        config: anything else for the model's config.

    Returns:
        `path`.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from shuteye.models.modules import quiet

    path = Path(path)
    special = _speech_tokens(multilingual=multilingual)
    end = special["<|endoftext|>"]
    settings: dict[str, Any] = {
        "vocab_size": max(special.values()) + 1,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 50,
        "max_target_positions": 32,
        "decoder_start_token_id": special["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "init_std": 0.5,  # wide enough for clear winners among the logits
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(WhisperConfig(**settings | config))
        _randomize_vectors(model)
        model.save_pretrained(path)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(path)
    _write_speech_tokenizer(path, special)
    generation = _speech_generation(special, multilingual=multilingual, max_length=model.config.max_target_positions)
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return path


def _speech_tokens(*, multilingual: bool) -> dict[str, int]:
    languages = ("<|en|>", "<|de|>", "<|fr|>") if multilingual else ("<|en|>",)
    tasks = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
    timestamps = [f"<|{index * 0.02:.2f}|>" for index in range(51)]
    names = ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks, *timestamps]
    return {name: _NUM_BYTES + index for index, name in enumerate(names)}


def _speech_generation(special: dict[str, int], *, multilingual: bool, max_length: int) -> dict[str, Any]:
    end = special["<|endoftext|>"]
    generation: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": special["<|startoftranscript|>"],
        "no_timestamps_token_id": special["<|notimestamps|>"],
        "prev_sot_token_id": special["<|startofprev|>"],
        "begin_suppress_tokens": [32, end],
        "suppress_tokens": [1, 2, *range(end + 1, special["<|notimestamps|>"])],
        "max_initial_timestamp_index": 10,
        "max_length": max_length,
        "is_multilingual": multilingual,
        "return_timestamps": False,
    }
    if multilingual:
        generation["lang_to_id"] = {name: special[name] for name in ("<|en|>", "<|de|>", "<|fr|>")}
        generation["task_to_id"] = {name: special[f"<|{name}|>"] for name in ("transcribe", "translate")}
    return generation


def _write_speech_tokenizer(path: Path, special: dict[str, int]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | special
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(path / "tokenizer.json"))
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_tiny_tokenizer(path: Path, *, vocab_size: int = MIN_VOCAB_SIZE, pairs: bool = False) -> None:
    """Write a fast byte-level BPE tokenizer: ids 0 to 2 are special, then bytes, then filler up to `vocab_size`.

    With `pairs`, texts are put between the first and the last of the special tokens, and the second of a pair is told
    from the first, as BERT's tokenizer does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    assert vocab_size >= MIN_VOCAB_SIZE, f"a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} tokens"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<|filler_{index}|>" for index in range(vocab_size - MIN_VOCAB_SIZE)]
    vocab = {token: index for index, token in enumerate([*_SPECIAL_TOKENS, *letters, *filler])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    if pairs:
        begin, end = _SPECIAL_TOKENS[0], _SPECIAL_TOKENS[2]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B:1 {end}:1", special_tokens=[(begin, 0), (end, 2)]
        )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[2],
        "pad_token": _SPECIAL_TOKENS[1 if pairs else 2],
        **({} if pairs else {"chat_template": CHAT_TEMPLATE}),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _randomize_vectors(model: torch.nn.Module) -> None:
    """Biases and norms start as zeros and ones, which would hide a tensor that was never loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
