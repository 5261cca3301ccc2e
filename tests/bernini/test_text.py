"""The renderer's text: prompts, the encoder, and tables of features."""

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bernini.errors import CheckpointError, ConfigError
from bernini.text.encoder import MAX_TOKENS, TextEncoder, TextFeatures, save_features, text_key
from bernini.text.prompt import clean_prompt, renderer_text

CPU = torch.device("cpu")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "ball", "rolls"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random UMT5 encoder and a word tokenizer in a Wan folder."""
    root = tmp_path_factory.mktemp("wan")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(root / "tokenizer")
    config = UMT5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UMT5EncoderModel(config).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture(scope="module")
def encoder(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \n\t red   ball ", "a red ball"),
        ("this &amp; that", "this & that"),
        ("this &amp;amp; that", "this & that"),
        ("<b> &amp;amp;", "<b> &"),
        ("donâ€™t", "don't"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(raw, clean):
    assert clean_prompt(raw) == clean
    assert clean_prompt(clean) == clean


@given(text=st.text(st.sampled_from("a é&;<>#amplt32\n\tâ€™"), max_size=20))
def test_prompts_are_cleaned_as_in_wans_pipeline(text):
    assert clean_prompt(text) == prompt_clean(text)


def test_sentence_and_prompt_are_joined_by_nothing():
    assert (
        renderer_text("v2v", " make it\nblue ")
        == "You are a helpful assistant specialized in video editing.make it blue"
    )
    assert renderer_text("t2v", "") == "You are a helpful assistant specialized in text-to-video generation."


def test_features_cover_the_real_tokens_and_the_end(encoder):
    short, long = encoder.encode(["a ball", "a red ball rolls"])
    assert short.shape == (3, 12) and long.shape == (5, 12)
    assert not short.requires_grad


def test_features_do_not_depend_on_the_batch(encoder):
    texts = ["a ball", "a red ball rolls", ""]
    for text, together in zip(texts, encoder.encode(texts), strict=True):
        torch.testing.assert_close(together, encoder.encode([text])[0])


def test_long_texts_are_cut(encoder):
    (features,) = encoder.encode(["ball " * 600])
    assert features.shape[0] == MAX_TOKENS


@pytest.mark.parametrize("part", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_incomplete_folders_are_refused(part, folder, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        if not part.startswith(name):
            (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.from_pretrained(tmp_path)
    assert caught.value.where == str(tmp_path / part) and caught.value.fix


@pytest.fixture
def table(tmp_path, randn):
    path = tmp_path / "text.safetensors"
    features = {"a red ball": randn(0)(4, 12), "": randn(1)(1, 12)}
    save_features(path, features)
    return path, features


def test_table_gives_back_what_was_saved(table):
    path, features = table
    found = TextFeatures(table=str(path))(["", "a red ball", ""], CPU)
    for text, rows in zip(["", "a red ball", ""], found, strict=True):
        assert torch.equal(rows, features[text])


def test_text_that_nobody_knows_is_refused(table):
    lookup = TextFeatures(table=str(table[0]))
    with pytest.raises(ConfigError, match="no features for the text 'a blue ball'") as caught:
        lookup(["a red ball", "a blue ball"], CPU)
    assert caught.value.fix == "set model.init_args.text.encoder"


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="table of text features does not exist") as caught:
        TextFeatures(table=str(tmp_path / "none.safetensors"))
    assert "bernini prepare" in caught.value.fix


def test_table_goes_before_the_encoder(table, folder, encoder):
    path, features = table
    known, other = TextFeatures(str(folder), str(path))(["a red ball", "a blue ball"], CPU)
    assert torch.equal(known, features["a red ball"])
    torch.testing.assert_close(other, encoder.encode(["a blue ball"])[0])


def test_texts_are_encoded_once(folder, monkeypatch):
    lookup = TextFeatures(str(folder))
    asked, encode = [], lookup.encoder.encode
    monkeypatch.setattr(lookup.encoder, "encode", lambda texts: asked.extend(texts) or encode(texts))
    first = lookup(["a ball", "a ball", "a red ball"], CPU)
    again = lookup(["a red ball", "a ball"], CPU)
    assert asked == ["a ball", "a red ball"]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], again[0]) and torch.equal(first[0], again[1])


def test_forgetting_keeps_what_the_call_needs(folder, encoder, monkeypatch):
    monkeypatch.setattr(TextFeatures, "REMEMBERED", 1)
    lookup = TextFeatures(str(folder))
    lookup(["a", "red"], CPU)
    found = lookup(["red", "blue"], CPU)
    for text, rows in zip(["red", "blue"], found, strict=True):
        torch.testing.assert_close(rows, encoder.encode([text])[0])


def test_keys_are_stable_and_distinct():
    assert text_key("a") == "ca978112ca1bbdcafac231b39a23dc4d"
    assert text_key("a") != text_key("a ")
