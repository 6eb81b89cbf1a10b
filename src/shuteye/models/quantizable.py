"""Which parameters of transformers' modules can be held quantized, and which of these with more care than others.

Those of linear layers and of the embedding of tokens. Matrices that modules use in ways of their own (experts in one
tensor, positions, GPT-2's transposed layers) stay as they are, and so do routers: small, and what they decide is not
made good by other columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from shuteye.models.modules import tied_names

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""What linear layers are called whose outputs choose experts."""


@dataclass(frozen=True, slots=True)
class Quantizable:
    """Names of parameters, tied ones included.

    Attributes:
        matrices: all that can be quantized.
        careful: of these, embeddings and heads: each of their rows is a token's own.
    """

    matrices: frozenset[str]
    careful: frozenset[str]


def quantizable(module: Any) -> Quantizable:
    """Of a model; its weights are not looked at."""
    tokens, head = module.get_input_embeddings(), module.get_output_embeddings()
    matrices, careful, others = set(), set(), set()
    ties = tied_names(module)
    for path, part in module.named_modules():
        is_linear = isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward
        is_tokens = part is tokens and isinstance(part, nn.Embedding)
        for leaf, parameter in part.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            names = {name, ties.get(name, name)}
            if leaf != "weight" or parameter.ndim != 2 or path.rpartition(".")[2] in _ROUTERS:
                others |= names
            elif is_linear or is_tokens:
                matrices |= names
                careful |= names if is_tokens or part is head else set()
            else:
                others |= names
    return Quantizable(frozenset(matrices - others), frozenset(careful - others))
