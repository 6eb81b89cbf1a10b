"""GGUF files of models that transformers' modules compute: what tensors are called there, and what is changed of them.

Both are asked of transformers, which reads such files itself. Files of architectures whose matrices it changes (rows in
another order, experts put together) are left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NORMS_LESS_ONE = frozenset({"gemma2", "gemma3", "nemotron"})
"""Architectures of which transformers changes norms alone."""


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """How one file's tensors become a module's.

    Attributes:
        names: what a tensor of the file is called in the module.
        processor: transformers', for what is not quantized.
    """

    names: dict[str, str]
    processor: Any

    def __call__(self, name: str) -> str | None:
        """What the module calls the tensor `name` of a file; None: it has none."""
        return self.names.get(name)

    def changed(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The numbers of a tensor `name` of the file as the module has them."""
        found: NDArray[np.float32] = np.asarray(self.processor.process(values, name).weights, np.float32)
        return found


def module_names(module: Any, architecture: str) -> ModuleNames | None:
    """The names of a module's tensors in files of an architecture; None: transformers has to read them, or cannot."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if architecture in TENSOR_PROCESSORS and architecture not in _NORMS_LESS_ONE:
        return None
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    try:
        return ModuleNames(get_gguf_hf_weights_map(module, processor), processor)
    except NotImplementedError:  # a model type that the gguf package does not know
        return None
