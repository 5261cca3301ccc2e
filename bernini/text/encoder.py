"""UMT5 text features, made by the frozen encoder or looked up in a table made once."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from bernini.checkpoints.parts import TEXT_ENCODER, TOKENIZER, first_of
from bernini.errors import CheckpointError, ConfigError

MAX_TOKENS = 512


def text_key(text: str) -> str:
    """Name of a text in a table of features."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def context_rows(folder: str | Path) -> int:
    """Context rows of a family's renderer: the longest text of its tokenizer, at most 512.

    Args:
        folder: Wan folder with ``tokenizer/``.

    Raises:
        CheckpointError: It has none.
    """
    root = Path(folder)
    path = (first_of(root, TOKENIZER) or root / TOKENIZER[0]) / "tokenizer_config.json"
    if not path.is_file():
        raise CheckpointError("no tokenizer here", where=str(path), fix="point at a Wan diffusers folder")
    return min(MAX_TOKENS, int(json.loads(path.read_text()).get("model_max_length", MAX_TOKENS)))


class TextEncoder(nn.Module):
    """A frozen UMT5 encoder and its tokenizer.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "TextEncoder":
        """Read ``text_encoder/`` and ``tokenizer/`` of a Wan folder, or the same with ``t5_`` of a released one.

        Raises:
            CheckpointError: One of them is not there.
        """
        root = Path(folder)
        config = TEXT_ENCODER.config(root) or root / TEXT_ENCODER.configs[0]
        tokenizer = first_of(root, TOKENIZER) or root / TOKENIZER[0]
        for file in (config, tokenizer / "tokenizer_config.json"):
            if not file.is_file():
                raise CheckpointError(
                    "no text encoder here", where=str(file), fix="point text.encoder at a Wan diffusers folder"
                )
        model = UMT5EncoderModel.from_pretrained(config.parent, dtype=dtype, local_files_only=True)
        return cls(model, AutoTokenizer.from_pretrained(tokenizer, local_files_only=True))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features ``[rows, dim]`` of each text: its real tokens with the end token, at most 512."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
            add_special_tokens=True,
        ).to(device)
        hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [row[: int(mask.sum())] for row, mask in zip(hidden, tokens.attention_mask, strict=True)]


def save_features(path: str | Path, features: dict[str, Tensor]) -> None:
    """Write a table of features, text -> ``[rows, dim]``."""
    save_file({text_key(text): rows.contiguous() for text, rows in features.items()}, path)


class TextFeatures(nn.Module):
    """Text to features: from a table, else from the encoder, which then remembers short lists such as task sentences.

    Args:
        encoder: Folder of a Wan checkpoint with ``text_encoder/`` and ``tokenizer/``, or null.
        table: File written by ``bernini prepare``, or null.
        dtype: Dtype of the encoder.
    """

    REMEMBERED = 256

    def __init__(
        self, encoder: str | None = None, table: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.encoder = TextEncoder.from_pretrained(encoder, dtype) if encoder else None
        if table and not Path(table).is_file():
            raise ConfigError(
                "the table of text features does not exist", where=table, fix="run `bernini prepare --text`"
            )
        self._table = load_file(table) if table else {}
        self._recent: dict[str, Tensor] = {}

    def __call__(self, texts: Iterable[str], device: torch.device) -> list[Tensor]:
        """Features ``[rows, dim]`` of each text on ``device``.

        Raises:
            ConfigError: A text is not in the table and there is no encoder.
        """
        texts = list(texts)
        keys = [text_key(t) for t in texts]
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._table and k not in self._recent}
        if missing:
            if self.encoder is None:
                raise ConfigError(
                    f"no features for the text {next(iter(missing.values()))[:80]!r}",
                    why="it is not in the table of prepared texts, and there is no text encoder",
                    fix="set model.init_args.text.encoder",
                )
            if len(self._recent) > self.REMEMBERED:
                self._recent = {k: self._recent[k] for k in keys if k in self._recent}
            for key, text in missing.items():  # one by one, as rounding depends on what else is in a batch
                self._recent[key] = self.encoder.encode([text])[0]
        return [(self._table[k] if k in self._table else self._recent[k]).to(device) for k in keys]
