"""What an image says of its weights' numbers."""

from __future__ import annotations

from shuteye.memory.layout import TensorSpec, plan_layout
from shuteye.memory.precision import Precision


def test_the_format_is_that_of_nearly_all_numbers_with_the_bits_they_take() -> None:
    """Would catch norms named beside the matrices, panels named as a format, or bits without scales."""
    specs = [
        TensorSpec("embed", (512, 256), "bfloat16", kind="q8_0"),
        TensorSpec("mlp", (1024, 256), "bfloat16", kind="q4_0"),
        TensorSpec("norm", (256,), "bfloat16"),
    ]
    found = Precision.of(plan_layout(specs, page_bytes=4096))
    assert found.format == "q4_0 and q8_0"
    assert 5.8 < found.bits_per_weight < 5.9  # a third of 8.5, two of 4.5


def test_panels_are_of_the_dtype_they_hold() -> None:
    """Would catch a packed bfloat16 image that is called by another name than an unpacked one."""
    for kind in ("rows", "bf16"):
        specs = [TensorSpec("w", (64, 64), "bfloat16", kind=kind)]
        assert str(Precision.of(plan_layout(specs, page_bytes=4096))) == "bfloat16 (16 bits per weight)"
