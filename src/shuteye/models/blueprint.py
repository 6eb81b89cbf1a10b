"""A transformers module without weights: parameters on meta, buffers real, our attention chosen.

Knows nothing of checkpoints, images or arenas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shuteye.models.tasks import model_class, model_options


def build_module(
    config: Any, *, dtype: torch.dtype, attention: str, buffers_on_meta: bool = False, task: str = "generate"
) -> Any:
    """A module in eval mode whose parameters are on meta and need no gradients.

    Buffers are computed for real, as the model's constructor does (`inv_freq` is in no checkpoint), unless
    `buffers_on_meta`. The config is copied: the choice of attention is kept on it.
    """
    from transformers import initialization

    config = copy.deepcopy(config)
    if task == "generate":
        config.pad_token_id = None  # nothing is padded; some models look for it in every input
    found = model_class(config, task)
    options = model_options(found, task)
    device = torch.device("meta" if buffers_on_meta else "cpu")
    with _parameters_on_meta(), initialization.no_init_weights(), device:
        module = found._from_config(config, dtype=dtype, attn_implementation=attention, **options)
    return module.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside are moved to meta before anything has touched their memory."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta":
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook: Callable[..., Any] = to_meta
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off the terminal; ours replace them."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_reader.tqdm
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    gguf_reader.tqdm = logging.tqdm  # it alone does not heed transformers' switch
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tied_names(module: Any) -> dict[str, str]:
    """Tied parameter → the parameter whose memory it shares, by full names, chains resolved."""
    ties: dict[str, str] = dict(module.all_tied_weights_keys)
    return {name: _resolve(ties, name) for name in ties}


def _resolve(ties: dict[str, str], name: str) -> str:
    while name in ties:
        name = ties[name]
    return name
