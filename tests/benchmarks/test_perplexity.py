"""Perplexity of a fixed text: that it is the same text, the same tokens, and llama.cpp's own numbers."""

import importlib.metadata
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import machine
import perplexity
import prose
import report
import scored_files
import scores
import serve
from shuteye.matrices.stored import dequantized
from shuteye.models.formats.quantized_safetensors import open_safetensors, quantization_config
from shuteye.testing import tiny_model


def test_the_text_is_the_one_that_was_scored():
    """Figures of different texts under one name. Newer versions of mpmath may have another, and are refused by name."""
    if importlib.metadata.version("mpmath") == prose.MPMATH:
        assert len(prose.fixed_text().split()) > 10_000
    else:
        with pytest.raises(SystemExit, match=prose.MPMATH):
            prose.fixed_text()


def test_paragraphs_are_prose():
    """Examples and tables of digits, whose perplexity says little, in the text."""
    words = "The gamma function is a shifted version of the ordinary factorial, and it is defined for complex numbers."
    docstring = f"Title\n\n  {words}\n  {words}\n\n>>> gamma(3) # {words}\n\n{'3.14159 ' * 20}"
    assert prose.paragraphs(docstring) == [f"{words} {words}"]


def test_scores_compare_the_same_tokens():
    """llama.cpp's half of the tokens held against the reference's perplexity of all of them."""
    ours = np.log([[0.5, 0.25, 0.25]])
    reference = np.log([[0.5, 0.5, 0.25]])
    llama_cpp = np.array([[np.nan, math.log(0.25), math.log(0.25)]])
    found = scores.Scores.of("q4_0", ours=ours, reference=reference, llama_cpp=llama_cpp)
    assert found.shuteye == pytest.approx(32 ** (1 / 3))
    assert found.percent == pytest.approx((2 ** (1 / 3) - 1) * 100)
    assert found.apart == pytest.approx(math.log(2) / 2**0.5)
    assert scores.Scores.of("q4_0", ours=ours, reference=reference).apart == pytest.approx(math.log(2) / 3**0.5)
    assert found.llama_tokens == 2
    assert found.llama_percent == pytest.approx((2**0.5 - 1) * 100)
    assert found.llama_from_shuteye == 0
    kept = scores.ScoreReport(
        "2026-12-01", machine.this_machine(measured=False), (found, scores.Scores("bf16", 3, 10.0, 10.02, 0.01))
    )
    assert scores.ScoreReport.from_dict(json.loads(json.dumps(kept.as_dict()))) == kept
    assert "| bfloat16 | 10.0000 | 10.0200 | -0.200% | met | – | 0.0100 | – | – |" in report.page([], [kept])


def test_logits_of_llama_perplexity_are_read_as_it_writes_them(tmp_path):
    """Scores of the wrong tokens, or of other tokens than ours."""
    pieces, vocab = [[0, 1, 2, 1], [2, 2, 0, 1]], 3
    file = struct.pack("<8siii", b"_logits_", 4, vocab, 2) + np.array(pieces, "<i4").tobytes()
    for row in ([100, 200, 300], [7, 8, 9]):  # the third token of each window foretells its fourth, which is a 1
        file += struct.pack("<ff", 0.5, -200.0) + np.array([*row, 0], "<u2").tobytes()
    (tmp_path / "logits").write_bytes(file)
    found = perplexity.read_logits(tmp_path / "logits", pieces)
    assert np.isnan(found[:, :2]).all()
    assert found[:, 2].tolist() == [0.5 * 200 - 200, 0.5 * 8 - 200]
    found = perplexity.read_logits(tmp_path / "logits", [[0, 1, 2, 1], [2, 2, 0, 2]])
    assert found[0, 2] == 0.5 * 200 - 200
    assert np.isnan(found[1]).all()
    with pytest.raises(SystemExit, match="other tokens"):
        perplexity.read_logits(tmp_path / "logits", [[0, 1, 2, 2], [2, 2, 0, 2]])


def test_figures_of_one_format_are_kept_beside_those_of_others(tmp_path, monkeypatch):
    """Hours of other formats lost when one is measured again."""
    monkeypatch.setattr(serve, "SCORES", tmp_path / "perplexity")
    here = machine.this_machine(measured=False)
    for form, shuteye in (("q4_0", 9.0), ("bf16", 8.0), ("q4_0", 9.5)):
        perplexity.keep(here, scores.Scores(form, 3, shuteye, 9.0, 0.01))
    (kept,) = serve.read_scores()
    assert [(each.format, each.shuteye) for each in kept.scores] == [("bf16", 8.0), ("q4_0", 9.5)]


@pytest.mark.parametrize("groups", [scored_files.Groups(4, 32), scored_files.Groups(8, None)])
def test_groups_are_read_as_they_are_meant(tmp_path, groups):
    """A reference of other weights than those that are served."""
    made = tiny_model(tmp_path / "model")
    scored_files._write_groups(made, tmp_path / "groups", groups)
    meant = dict(scored_files._meant(made, groups))
    config = quantization_config(tmp_path / "groups")
    with open_safetensors(tmp_path / "groups", config) as tensors:
        assert len(tensors.matrices) == 14
        for name in tensors.matrices:
            assert np.array_equal(dequantized(tensors.read(name)), meant[name].numpy()), name
