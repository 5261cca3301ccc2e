"""The toy family's text side: tokenizers trained on the toy world's sentences and a small UMT5 encoder.

``python -m datamodules.toyworld.family assets/toy`` writes everything of a Wan diffusers folder that is not trained:
the VAE and the transformers come from `bernini fit`.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bernini.errors import ConfigError
from bernini.tasks import DEFAULT_SENTENCE, TASKS
from bernini.text.prompt import renderer_text
from datamodules.toyworld.data import ToyWorld
from datamodules.toyworld.edits import EDITS, UNSEEN
from datamodules.toyworld.items import items
from datamodules.toyworld.questions import QUESTIONS

SPECIAL = ("<pad>", "</s>", "<unk>")
QWEN = tuple(
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
)
SENTENCES = 2400
VOCABULARY = 4096
ROWS = 48  # of context: no sentence of the toy world is longer
HEAD_DIM = 16
NEIGHBOURS = (-1, 1, 2, 3, -1, -2, 3, 4)  # where the heads look, layer by layer, in tokens from their own
SHARPNESS = 6.0  # bias of that token's attention logit, beside random ones of standard deviation 1

INDEX = {
    "_class_name": "WanPipeline",
    "boundary_ratio": 0.875,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
"""``model_index.json`` of the family: what each folder holds."""


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows every word of the toy world as one token and can spell any other text.

    Args:
        seed: Seed of the toy samples whose texts it is trained on.

    Returns:
        A tokenizer that ends a text with ``</s>`` and pads with ``<pad>``, which is token 0 as in UMT5.
    """
    samples = items(list(TASKS), SENTENCES, seed=seed, frames=1, height=32, width=32)
    texts = (renderer_text(sample.task, sample.prompt) for sample in samples)
    tokenizer = _train(texts, SPECIAL, add_prefix_space=True)
    pad, end, unknown = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=ROWS,
        padding_side="right",
    )


def train_chat_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """The planner's tokenizer: Qwen's special tokens, and every word of instructions, questions and answers.

    Args:
        seed: Seed of the toy samples whose texts it is trained on.

    Returns:
        A byte-level BPE that adds nothing to a text by itself, as Qwen's.
    """
    known = {kind for table in (EDITS, UNSEEN) for kinds in table.values() for kind in kinds} - {"statue"}
    world = ToyWorld(dict.fromkeys([*TASKS, *QUESTIONS], 1.0), 1, 32, 32, seed, edits=sorted(known))
    samples = [world[index] for index in range(SENTENCES)]
    texts = [m.text for sample in samples for m in sample.messages if m.text]
    texts += [sample.info["explicit"] for sample in samples if "explicit" in sample.info]
    texts += [DEFAULT_SENTENCE, *(task.planner_sentence for task in TASKS.values()), "system", "user", "assistant"]
    tokenizer = _train(texts, QWEN, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=QWEN[0], eos_token="<|im_end|>")


def _train(texts: Iterable[str], special: Sequence[str], add_prefix_space: bool) -> Tokenizer:
    """Byte-level BPE of the words of some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def random_encoder(vocabulary: int, *, dim: int = 64, layers: int = 2, seed: int = 0) -> UMT5EncoderModel:
    """A UMT5 encoder with random weights, but for its heads, each of which looks at one token near its own.

    So a token's features hold it and its neighbours, in order: a shape's features say which colour is its own. Heads
    without such a bias mix the tokens of the whole sentence alike.

    Args:
        vocabulary: Number of tokens.
        dim: Width, a multiple of 16.
        layers: Layers.
        seed: Seed of the weights.

    Raises:
        ConfigError: The width is not a multiple of 16.
    """
    if dim % HEAD_DIM or dim < HEAD_DIM:
        raise ConfigError(f"a text encoder of width {dim}", why=f"it is made of heads of {HEAD_DIM}", fix="dim 64")
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=HEAD_DIM,
        num_heads=dim // HEAD_DIM,
        d_ff=2 * dim,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
        offsets = cycle(NEIGHBOURS)
        for layer in range(layers):
            name = f"encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
            bias = model.get_parameter(name).zero_()  # [buckets, heads]
            for head in range(config.num_heads):
                offset = next(offsets)
                # Small distances have a bucket each, those ahead in the upper half.
                bias[abs(offset) + (config.relative_attention_num_buckets // 2 if offset > 0 else 0), head] = SHARPNESS
    return model.eval()


def build_text(folder: str | Path, *, dim: int = 64, layers: int = 2, seed: int = 0) -> None:
    """Write ``tokenizer/``, ``text_encoder/``, ``scheduler/``, ``model_index.json`` and the tokenizer in ``mllm/``.

    Args:
        folder: Where to.
        dim: Width of the text features, a multiple of 16.
        layers: Layers of the encoder.
        seed: Seed of the weights and of the texts that the tokenizer is trained on.
    """
    root = Path(folder)
    tokenizer = train_tokenizer(seed)
    tokenizer.save_pretrained(root / "tokenizer")
    train_chat_tokenizer(seed).save_pretrained(root / "mllm")
    random_encoder(len(tokenizer), dim=dim, layers=layers, seed=seed).save_pretrained(root / "text_encoder")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build_text)
