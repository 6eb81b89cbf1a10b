"""Embeddings and scores are those of transformers' own modules, text by text, without padding."""

import json
import logging

import pytest
import torch

from shuteye.errors import UnsupportedModel
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.models.encoder import bind_encoder
from shuteye.models.image_builder import open_image
from shuteye.models.sources import resolve_source
from shuteye.tasks.pool.requests import PoolInput
from shuteye.testing import tiny_encoder
from shuteye.tokenizer import Tokenizer

TEXTS = ["a", "the quick brown fox", "jumps", "over the lazy dog, and further than that", "naïve café 東京"]
PAIRS = [("a", "the quick brown fox"), ("what is a dog?", "jumps"), ("x", "over the lazy dog, twice")]


@pytest.fixture
def bound(image_store, tmp_path):
    """Bind a checkpoint as a worker does; closed when the test ends."""
    opened = []

    def bind(path, dtype="float32"):
        image = open_image(resolve_source(str(path), cache_dir=tmp_path), dtype=dtype, store=image_store)
        arena = Arena.reserve(open_backend("linux"), tag="weights", nbytes=image.layout.nbytes)
        arena.map_file(0, image.layout.nbytes, fd=image.fd)
        opened.extend((arena, image))
        return bind_encoder(image, arena)

    yield bind
    for each in opened:
        each.close()


def inputs_of(path, texts):
    tokenizer = Tokenizer.from_directory(path)
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    return [PoolInput(*map(tuple, tokenizer.encode_pair(text, pair))) for text, pair in pairs]


def reference(path, texts, how):
    """One text at a time through transformers' auto classes and its own tokenizer."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    from shuteye.models.modules import quiet

    kind = AutoModel if how else AutoModelForSequenceClassification
    with quiet(), torch.inference_mode():
        model, tokenizer = kind.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        rows = []
        for text in texts:
            given = (
                tokenizer(text, return_tensors="pt") if isinstance(text, str) else tokenizer(*text, return_tensors="pt")
            )
            output = model(**given)
            if how is None:
                rows.append(torch.sigmoid(output.logits[0]))
                continue
            states = output.last_hidden_state[0]
            pooled = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1], "max": states.amax(0)}
            rows.append(torch.nn.functional.normalize(pooled[how], dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("architecture", "pooling", "config"),
    [
        ("bert", "mean", {}),
        ("bert", "max", {}),
        ("roberta", "cls", {}),
        ("mpnet", "mean", {}),
        ("modernbert", "lasttoken", {"cls_token_id": 0, "sep_token_id": 2}),
        ("distilbert", "mean", {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}),
        ("llama", "lasttoken", {"num_key_value_heads": 2}),
    ],
)
def test_embeddings_are_those_of_transformers(tmp_path, bound, architecture, pooling, config):
    """Padding that is seen, positions counted wrongly, a tensor not loaded, another pooling."""
    path = tiny_encoder(tmp_path / "model", architecture=architecture, pooling=pooling, **config)
    model = bound(path)
    inputs = inputs_of(path, TEXTS)
    assert len({len(each.token_ids) for each in inputs}) > 2
    found = model.finish(model.forward(inputs))
    expected = reference(path, TEXTS, pooling)
    assert torch.cosine_similarity(found, expected).min() >= 0.9999
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_scores_are_those_of_transformers(tmp_path, bound, architecture):
    """Pairs whose two texts the model cannot tell apart, or padding that is seen."""
    path = tiny_encoder(tmp_path / "model", task="score", architecture=architecture)
    model = bound(path)
    inputs = inputs_of(path, PAIRS)
    assert model.facts.uses_type_ids == (architecture == "bert")
    found = model.finish(model.forward(inputs))
    torch.testing.assert_close(found, reference(path, PAIRS, None), atol=2e-6, rtol=0)
    assert not torch.equal(model.finish(model.forward(inputs), use_activation=False), found)


def test_the_activation_is_what_the_checkpoint_names(tmp_path, bound):
    identity = tiny_encoder(
        tmp_path / "model", task="score", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"
    )
    model = bound(identity)
    rows = model.forward(inputs_of(identity, PAIRS))
    assert torch.equal(model.finish(rows), rows)


def test_an_embedding_is_cut_before_it_is_normalised(tmp_path, bound):
    path = tiny_encoder(tmp_path / "model", matryoshka_dimensions=[16, 32])
    model = bound(path)
    assert model.pooling.dimensions == (16, 32)
    rows = model.forward(inputs_of(path, TEXTS))
    cut = model.finish(rows, dimensions=16)
    torch.testing.assert_close(cut, torch.nn.functional.normalize(rows[:, :16], dim=-1))
    assert torch.equal(model.finish(rows, use_activation=False), rows)


def test_a_checkpoint_that_does_not_normalise_is_left_so(tmp_path, bound):
    path = tiny_encoder(tmp_path / "model", normalize=False)
    model = bound(path)
    rows = model.forward(inputs_of(path, TEXTS))
    assert torch.equal(model.finish(rows), rows)
    torch.testing.assert_close(model.finish(rows, use_activation=True).norm(dim=-1), torch.ones(len(TEXTS)))


def test_without_sentence_transformers_files_it_says_what_it_assumes(tmp_path, bound, caplog):
    path = tiny_encoder(tmp_path / "model", pooling=None)
    with caplog.at_level(logging.WARNING, "shuteye"):
        model = bound(path)
    assert (model.facts.pooling, model.facts.normalize) == ("mean", True)
    assert "'mean'" in caplog.text


def test_the_context_is_the_shortest_of_what_the_files_say(tmp_path, bound):
    """The tokenizer is for 128. Roberta's positions begin after its padding token: of 100 there are 98 for tokens."""
    sizes = {"bert": 128, "roberta": 98}
    for architecture, expected in sizes.items():
        positions = 130 if architecture == "bert" else 100
        path = tiny_encoder(
            tmp_path / architecture, architecture=architecture, pooling=None, max_position_embeddings=positions
        )
        assert bound(path).facts.context_length == expected
    path = tiny_encoder(tmp_path / "short")
    edit(path / "sentence_bert_config.json", max_seq_length=40)
    assert bound(path).facts.context_length == 40


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_dense(path):
    modules = json.loads((path / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "9_Dense", "type": "sentence_transformers.models.Dense"})
    (path / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("options", "spoil", "cause"),
    [
        ({}, add_dense, "module 'Dense'"),
        ({}, lambda path: edit(path / "1_Pooling/config.json", pooling_mode_max_tokens=True), "'max' and 'mean'"),
        ({}, lambda path: edit(path / "1_Pooling/config.json", pooling_mode="weightedmean"), "'weightedmean'"),
        ({}, lambda path: edit(path / "sentence_bert_config.json", do_lower_case=True), "lowercased"),
        (
            {"task": "classify", "architecture": "llama", "num_key_value_heads": 2, "pad_token_id": None},
            None,
            "pad_token_id",
        ),
        ({"task": "score", "sbert_ce_default_activation_function": "torch.nn.Softmax"}, None, "Softmax"),
        ({"task": "score", "sbert_ce_default_activation_function": "torch.nn.Tanh"}, None, "Tanh"),
        (
            {"task": "score"},
            lambda path: edit(path / "tokenizer_config.json", chat_template="{{ messages }}"),
            "chat template",
        ),
    ],
    ids=[
        "dense",
        "two-poolings",
        "unknown-pooling",
        "lowercase",
        "no-padding",
        "softmax-of-one",
        "activation",
        "template",
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, bound, options, spoil, cause):
    path = tiny_encoder(tmp_path / "model", **options)
    if spoil is not None:
        spoil(path)
    with pytest.raises(UnsupportedModel, match=cause):
        bound(path)


def test_the_pooling_files_are_part_of_the_fingerprint(tmp_path):
    """An image made for another pooling."""
    path = tiny_encoder(tmp_path / "model")
    before = resolve_source(str(path), cache_dir=tmp_path).fingerprint
    edit(path / "1_Pooling/config.json", pooling_mode="cls")
    assert resolve_source(str(path), cache_dir=tmp_path).fingerprint != before


@pytest.mark.model
def test_minilm_embeds_as_transformers_does(minilm, bound):
    """The real checkpoint, whose tokenizer.json would cut and pad."""
    texts = [*TEXTS, "word " * 200]
    model = bound(minilm.path)
    found = model.finish(model.forward(inputs_of(minilm.path, texts)))
    assert torch.cosine_similarity(found, reference(minilm.path, texts, "mean")).min() >= 0.9999
