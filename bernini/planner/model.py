"""The planner as one model: Qwen2.5-VL, mask token, connector and flow head, under the released names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from bernini.checkpoints.parts import BERNINI, PLANNER, PLANNER_PREFIXES, read_json
from bernini.checkpoints.stored import StoredTensor, check_fit, load, read_folder
from bernini.errors import CheckpointError, ConfigError, DataError
from bernini.files import replacing
from bernini.lora import merge, take_updates
from bernini.planner.connector import Connector, ConnectorConfig
from bernini.planner.flow_head import Draws, FlowHead, FlowHeadConfig
from bernini.planner.masking import SOURCE, TARGET, SourceAttention, block_mask, visible
from bernini.planner.mllm import ATTENTION, embed_inputs, run_text
from bernini.planner.planning import Planner, PlanRequest, Stream
from bernini.planner.template import IGNORED, PlannerPack, PlannerSample
from bernini.planner.tower import attend_at_once, embed, fingerprint
from bernini.planner.vision import Visual
from bernini.sharding import gather
from bernini.ulysses import Axis

FOLDER, FILE, MLLM = BERNINI, "model.safetensors", "mllm"
TOWER = "mllm.visual."


@dataclass
class PlannerConfig:
    """Shape of what the planner adds to its multimodal LLM; widths that follow from that one are not asked for.

    Attributes:
        flow_width: Width of the flow head.
        flow_depth: Residual blocks of the flow head.
        flow_shift: Flow-matching shift of the flow head's sigmas.
        batch_mul: Noises that training draws for each token.
        gen_dim: Width of the renderer's text features.
        mask_tokens: Rows of the mask token's parameter, of which the first serves every position, as released.
    """

    flow_width: int = 4096
    flow_depth: int = 16
    flow_shift: float = 2.0
    batch_mul: int = 16
    gen_dim: int = 4096
    mask_tokens: int = 4096


class Telling(NamedTuple):
    """What a forward tells the renderer.

    Attributes:
        told: Bool ``[n]``, tokens whose hidden states become rows of the renderer's context.
        plans: Bool ``[n]``, k target tokens that do not show their features alone.
        levels: ``[k]`` how far each of them is on the way from its features, 0, to ``values``, 1.
        values: ``[k, D]``.
    """

    told: Tensor
    plans: Tensor
    levels: Tensor
    values: Tensor


class PlannerOutput(NamedTuple):  # in which every version of FSDP2 finds the tensors that backward starts from
    """What a forward leaves for the losses.

    Attributes:
        hidden: ``[n, D]`` hidden states behind the last layer but one.
        logits: ``[m, V]`` next-token logits in front of the m labelled tokens.
        labels: ``[m]`` those tokens.
        visual: ``[k]`` flow loss of the k hidden tokens, fp32; null where none was asked for.
        rows: ``[r, G]`` rows of the renderer's context, of the r tokens that it is told; null likewise.
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor
    visual: Tensor | None
    rows: Tensor | None = None


class PlannerModel(nn.Module):
    """Everything of the planner that has weights; those of the vision tower are frozen unless told otherwise.

    Args:
        mllm: Qwen2.5-VL.
        config: Shape of the rest.

    Attributes:
        tower_print: Fingerprint of a vision tower that was read from a folder; only its features are taken.
        axis: Ranks that run the text model together in a forward, each on a slice of the tokens.
    """

    axis: Axis = Axis()

    def __init__(self, mllm: Qwen2_5_VLForConditionalGeneration, config: PlannerConfig) -> None:
        super().__init__()
        self.mllm, self.config = mllm, config
        self.tower_print = ""
        attend_at_once(self.tower)
        self.tower.requires_grad_(False)
        width = self.embedding.embedding_dim
        self.connector = Connector(ConnectorConfig(hidden=width, vit_dim=width, gen_dim=config.gen_dim))
        self.vit_decoder = FlowHead(
            FlowHeadConfig(
                target_dim=width,
                condition_dim=width,
                width=config.flow_width,
                depth=config.flow_depth,
                shift=config.flow_shift,
                batch_mul=config.batch_mul,
            )
        )
        self.mask_tokens = nn.Parameter(0.01 * torch.randn(1, config.mask_tokens, width))

    @property
    def text(self) -> Qwen2_5_VLTextModel:
        """The text model."""
        return self.mllm.model.language_model

    @property
    def embedding(self) -> nn.Embedding:
        """Input embeddings of the text model."""
        return cast(nn.Embedding, self.text.get_input_embeddings())

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts that hold most of the weights and run one after the other: what to shard."""
        tower: Any = self.tower
        return [*tower.blocks, *self.text.layers, *self.vit_decoder.net.res_blocks]

    @property
    def tower(self) -> PreTrainedModel:
        """The vision tower, whose merged outputs are the ViT embeddings."""
        return self.mllm.model.visual

    def see(self, visuals: Sequence[Visual]) -> Tensor:
        """ViT embeddings ``[tokens, D]`` of visuals, one after the other; neither of them sees another.

        Prepared ones are taken as they are.

        Raises:
            ConfigError: Features were prepared, and the vision tower is trained.
            DataError: Prepared features are another tower's.
        """
        raw = [visual for visual in visuals if visual.features is None]
        if len(raw) == len(visuals):
            return embed(self.tower, raw)
        weights = list(self.tower.parameters())
        weight = weights[0]
        for visual in visuals:
            self._check_features(visual, trained=weight.requires_grad)
        # A tower that is sharded runs all the same: a rank that left it out would leave the others waiting.
        sharded = any(isinstance(own, DTensor) for own in weights)
        made = embed(self.tower, raw) if raw or sharded else weight.new_empty(0, 0)
        parts = iter(made.split([visual.tokens for visual in raw]))
        return torch.cat(
            [
                next(parts) if visual.features is None else visual.features.to(weight.device, weight.dtype)
                for visual in visuals
            ]
        )

    def _check_features(self, visual: Visual, trained: bool) -> None:
        if visual.features is None:
            return
        if trained:
            raise ConfigError(
                "prepared ViT features cannot train the vision tower",
                where="model.init_args.train_vit",
                why="they are what the tower gave before",
                fix="train from data that has pixels in place of features, or leave the tower frozen",
            )
        found, wanted = tuple(visual.features.shape), (visual.tokens, self.embedding.embedding_dim)
        if visual.tower != self.tower_print or found != wanted:
            other = f"its fingerprint is {visual.tower}, not {self.tower_print or 'that of random weights'}"
            raise DataError(
                "prepared ViT features are not those of this planner's vision tower",
                why=other if found == wanted else f"their shape is {list(found)}, expected {list(wanted)}",
                fix="prepare the data with the folder that init_from names: bernini prepare --planner FOLDER",
            )

    def forward(
        self,
        pack: PlannerPack,
        features: Tensor | None = None,
        masked: Tensor | None = None,
        draws: Draws | None = None,
        sources: SourceAttention = "causal",
        telling: Telling | None = None,
    ) -> PlannerOutput:
        """One pass over packed samples, up to the flow head's loss and the renderer's context.

        All that is trained runs in every pass, on no token if need be: ranks that share weights or gradients stay in
        step whatever their samples are, and each parameter has a gradient.

        Args:
            pack: The samples.
            features: ``[tokens, D]`` ViT embeddings of all visuals, true targets included; the vision tower's if null.
            masked: Bool ``[n]``, target tokens that are hidden behind the mask token; all others show their features.
            draws: Timesteps and noises of the k hidden tokens, for their loss.
            sources: Attention among the tokens of a source.
            telling: What the renderer is told.
        """
        features = self.see(pack.visuals) if features is None else features
        visual = (pack.token_type == SOURCE) | (pack.token_type == TARGET)
        shown = features
        if telling is not None and len(telling.values):
            at, values = telling.plans[visual], telling.values.to(features.dtype)
            shown = features.clone()
            shown[at] = torch.lerp(features[at], values, telling.levels[:, None].to(features.dtype))
        embeds = embed_inputs(self.embedding, pack.ids, visual, shown, masked, self.mask_tokens[0, 0])
        block = embeds.device.type == "cuda" and self.text.config._attn_implementation == ATTENTION
        mask = (block_mask if block else visible)(pack.token_type, pack.segment_id, pack.sample, sources)
        states = run_text(self.text, embeds[None], pack.position_ids[:, None], mask, final=True, axis=self.axis)
        hidden, final = states.penultimate[0].clone(), states.final  # FSDP2 warns of outputs that are views
        assert final is not None
        asked = torch.nonzero(pack.labels[1:] != IGNORED).squeeze(1)  # the token in front of a label predicts it
        logits = self.mllm.lm_head(final[0, asked])
        loss = None
        if masked is not None and draws is not None:
            truth = features.detach()[masked[visual]]
            loss = self.vit_decoder.loss(self.connector.for_vit(hidden[masked]), truth, draws)
        rows = None if telling is None else self.connector.for_gen(hidden[telling.told])
        return PlannerOutput(hidden, logits, pack.labels[1:][asked], loss, rows)

    def requests(self, streams: Sequence[dict[str, PlannerSample]], seeds: Sequence[int]) -> list[PlanRequest]:
        """What `Planner` takes, from the sequences that `PlannerTemplate.streams` writes; all sources are seen at once.

        Args:
            streams: ``cond``, ``uncond`` and ``imgcond`` of each; known targets are not looked at.
            seeds: Seed of each one's order and noise.

        Raises:
            DataError: There is no target to plan.
        """
        if any(own["cond"].target_grid is None for own in streams):
            raise DataError("a plan without a target", fix="ask for an image or a clip")
        asked = [
            [name for name in own if name != "imgcond" or bool((own["cond"].token_type == SOURCE).any())]
            for own in streams
        ]
        made = iter(self.streams([own[name] for own, names in zip(streams, asked, strict=True) for name in names]))
        return [
            PlanRequest(**{name: next(made) for name in names}, seed=seed, grid=own["cond"].target_grid)
            for own, names, seed in zip(streams, asked, seeds, strict=True)
        ]

    def planner(self) -> Planner:
        """Makes plans with these weights."""
        return Planner(self.text, self.connector, self.vit_decoder)

    def streams(self, samples: Sequence[PlannerSample]) -> list[Stream]:
        """Sequences as the text model takes them: ViT embeddings for sources, the mask token for the target."""
        device = self.mask_tokens.device
        shown = [s.visuals[: int(s.segment_id[s.token_type == SOURCE].unique().numel())] for s in samples]
        distinct = list({id(visual): visual for own in shown for visual in own}.values())  # streams share sources
        seen = self.see(distinct)
        features = dict(zip(map(id, distinct), seen.split([visual.tokens for visual in distinct]), strict=False))
        made = []
        for sample, own in zip(samples, shown, strict=True):
            kind = sample.token_type.to(device)
            rows = torch.cat([seen[:0], *(features[id(visual)] for visual in own)])
            ids = sample.ids.to(device)
            embeds = embed_inputs(self.embedding, ids, kind == SOURCE, rows, kind == TARGET, self.mask_tokens[0, 0])
            made.append(Stream(embeds, sample.position_ids.to(device), kind, sample.segment_id.to(device)))
        return made


def build(config: PlannerConfig, mllm: Qwen2_5_VLConfig) -> PlannerModel:
    """A planner with random weights."""
    mllm._attn_implementation = ATTENTION
    return PlannerModel(Qwen2_5_VLForConditionalGeneration(mllm), config)


def released_name(name: str) -> str:
    """Name in a released checkpoint, which has Qwen2.5-VL's first layout, of a tensor of `PlannerModel`.

    Transformers turns these names back when it reads them.
    """
    name = name.replace("mllm.model.language_model.", "mllm.model.", 1)
    return name.replace("mllm.model.visual.", TOWER, 1)


def save_planner(model: PlannerModel, folder: Path, dtype: torch.dtype | None = None, write: bool = True) -> None:
    """Write ``bernini/`` with the weights and ``mllm/config.json``, as a released folder has them.

    Args:
        model: The planner; a LoRA of it is folded into what is written.
        folder: The folder; its tokenizer is not touched.
        dtype: Dtype on disk; the weights' own if null.
        write: Whether this rank writes; with sharded weights every rank has to call.
    """
    whole = gather(model)
    if not write:
        return
    merge(whole, take_updates(model, whole))
    tensors = {released_name(name): x.to(dtype or x.dtype).contiguous() for name, x in whole.items()}
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with replacing(folder / FOLDER / FILE) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    model.mllm.config.save_pretrained(folder / MLLM)


def load_planner(
    folder: str | Path, dtype: torch.dtype = torch.float32, config: PlannerConfig | None = None
) -> PlannerModel:
    """Read the planner of a released folder, or of one that `save_planner` wrote; the renderer's tensors are left.

    The folder of a stock Qwen2.5-VL gives a planner too, of which connector, flow head and mask token are drawn anew.

    Args:
        folder: Folder with ``bernini/`` and ``mllm/``, or of a Qwen2.5-VL.
        dtype: Dtype of the weights.
        config: What weights do not tell, ``flow_shift`` and ``batch_mul``; the released ones if null. Shapes are those
            of the weights, and those of ``config`` where there are none.

    Raises:
        CheckpointError: There is no planner, or its tensors are not exactly those of its configuration.
    """
    root = Path(folder)
    with _reading(root):
        tensors, shape = _stored(root)
        config = shaped(config or PlannerConfig(), tensors)
        _check(root, tensors, config, shape, ("mllm.",) if _is_stock(root) else PLANNER_PREFIXES)
        weights = load(tensors, dtype)
        given = {name.removeprefix("mllm."): weights.pop(name) for name in tensors if name.startswith("mllm.")}
        model = PlannerModel(_pretrained(Qwen2_5_VLForConditionalGeneration, shape, given, dtype), config)
        drawn = {name: x.to(dtype) for name, x in model.state_dict().items() if not name.startswith("mllm.")}
        model.load_state_dict(drawn | weights, strict=False, assign=True)
    model.tower_print = fingerprint(model.tower)
    return model.eval()


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Read the vision tower alone of a folder that `load_planner` takes.

    Raises:
        CheckpointError: There is no planner, or its tower does not have the tensors of its configuration.
    """
    root = Path(folder)
    with _reading(root):
        tensors, shape = _stored(root, TOWER)
        _check(root, tensors, PlannerConfig(), shape, (TOWER,))
        given = {name.removeprefix(TOWER): x for name, x in load(tensors, dtype).items()}
        kind = Qwen2_5_VisionTransformerPretrainedModel
        tower = _pretrained(kind, cast(PreTrainedConfig, shape.vision_config), given, dtype)
    attend_at_once(tower)
    return tower.eval().requires_grad_(False)


def planner_shapes(config: PlannerConfig, mllm: Qwen2_5_VLConfig) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Shapes of a planner's tensors by released name, and names of tied ones with those that they are tied to."""
    with torch.device("meta"):
        model = build(config, mllm)
    named = {released_name(name): x.shape for name, x in model.state_dict().items()}
    tied: dict[str, str] = model.mllm.all_tied_weights_keys
    return named, {released_name(f"mllm.{one}"): released_name(f"mllm.{other}") for one, other in tied.items()}


def _check(
    root: Path,
    tensors: Mapping[str, StoredTensor],
    config: PlannerConfig,
    mllm: Qwen2_5_VLConfig,
    parts: tuple[str, ...],
) -> None:
    """Refuse tensors that are not exactly those of the parts whose names begin so."""
    shapes, tied = planner_shapes(config, mllm)
    expected = {name: shape for name, shape in shapes.items() if name.startswith(parts)}
    check_fit("planner", root, tensors, expected, optional=tied)


def _is_stock(root: Path) -> bool:
    """Whether this is the folder of a Qwen2.5-VL."""
    config = root / "config.json"
    return config.is_file() and read_json(config).get("model_type") == Qwen2_5_VLConfig.model_type


def _stored(root: Path, begin: str = "") -> tuple[dict[str, StoredTensor], Qwen2_5_VLConfig]:
    """A planner's tensors by their released names, those that begin so, and its multimodal LLM's configuration."""
    if _is_stock(root):
        where, tensors = root, {released_name(f"mllm.{name}"): x for name, x in read_folder(root).items()}
    else:
        where, tensors = root / MLLM, PLANNER.find(root)
    if not (where / "config.json").is_file():  # transformers would take the folder for a name on the hub
        raise FileNotFoundError(f"there is no {where / 'config.json'}")
    shape = Qwen2_5_VLConfig.from_pretrained(where, local_files_only=True)
    return {name: x for name, x in tensors.items() if name.startswith(begin)}, shape


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Tells what goes wrong while a planner is read."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            "the planner cannot be read",
            where=str(root),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            fix="train or download it first, or point at a folder whose bernini/ and mllm/ belong together",
        ) from error


def _pretrained(
    kind: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, Tensor], dtype: torch.dtype
) -> Any:
    """A model of transformers with these weights."""
    return kind.from_pretrained(None, config=config, state_dict=tensors, attn_implementation=ATTENTION, dtype=dtype)


def shaped(config: PlannerConfig, tensors: Mapping[str, StoredTensor]) -> PlannerConfig:
    """The configuration with the shapes of those tensors, under their released names, that are there."""
    told = {
        "flow_width": ("vit_decoder.net.input_proj.weight", 0),
        "gen_dim": ("connector.proj_gen.0.weight", 0),
        "mask_tokens": ("mask_tokens", 1),
    }
    found = {key: tensors[name].shape[axis] for key, (name, axis) in told.items() if name in tensors}
    if depth := sum(name.endswith(".in_ln.weight") for name in tensors):
        found["flow_depth"] = depth
    return replace(config, **found)
