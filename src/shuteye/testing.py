"""What tests need: tiny random checkpoints, and memory that shows whether it was rewritten.

Knows nothing of pytest; shipped, so that plug-in authors can test too.
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

    from shuteye.models.blueprint import quiet

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


def write_tiny_tokenizer(path: Path, *, vocab_size: int = MIN_VOCAB_SIZE) -> None:
    """Write a fast byte-level BPE tokenizer: ids 0 to 2 are special, then bytes, then filler up to `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    assert vocab_size >= MIN_VOCAB_SIZE, f"a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} tokens"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<|filler_{index}|>" for index in range(vocab_size - MIN_VOCAB_SIZE)]
    vocab = {token: index for index, token in enumerate([*_SPECIAL_TOKENS, *letters, *filler])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[2],
        "pad_token": _SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _randomize_vectors(model: torch.nn.Module) -> None:
    """Biases and norms start as zeros and ones, which would hide a tensor that was never loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
