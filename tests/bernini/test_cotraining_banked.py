"""Co-training from a bank: the losses and gradients of the plain module, in fixed shapes and without waiting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import EVERY, make_cotraining, make_cotraining_config, make_planner_folder
from factories import build, fit, logged_rows, write_config
from planners import SIZE
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from bernini.cli import main
from bernini.conversation import Conversation
from bernini.cotraining.bank import CoBank, CoStack
from bernini.cotraining.banked import BankedCoTrainingModule
from bernini.cotraining.banked_plans import PlanDraws
from bernini.cotraining.conditions import ConditionDropout
from bernini.cotraining.examples import Example, make_example
from bernini.cotraining.exposure import PlanExposure
from bernini.cotraining.passing import COINS, SUMS, Beside, CoDraws, CoTrainingPass
from bernini.cotraining.settings import CoTrainingLoss
from bernini.errors import ConfigError
from bernini.planner.bank import join, write
from bernini.planner.flow_head import Draws
from bernini.planner.learning import draw_noises
from bernini.planner.masking import TARGET
from bernini.planner.planning import PlanningConfig
from bernini.planner.reveal import reveal_counts, reveal_order
from bernini.renderer.bank import Stack
from bernini.renderer.banked import Noises, StackedPass
from bernini.renderer.experts import experts_of
from bernini.seeds import draw_seed
from bernini.text.prompt import renderer_text
from datamodules.toyworld import make_item, make_question

KINDS = (  # samples of each kind; those without a target come last
    [make_item("rv2v", seed, **SIZE) for seed in range(4)],
    [make_item("v2v", seed, **SIZE) for seed in range(3)],
    [make_item("t2i", seed, **SIZE) for seed in range(2)],
    [make_item("r2v", seed, references=2, **SIZE) for seed in range(3)],
    [make_question("und_vid", 0, **SIZE), make_question("und_img", 1, **SIZE)],
)
SAMPLES = [sample for kind in KINDS for sample in kind]
ROWS = torch.cat([torch.arange(len(kind)) for kind in KINDS])
OFTEN = {"text": 0.5, "image": 0.4, "video": 0.4, "plan": 0.4}
EXPOSURES = {
    "visible": PlanExposure(),
    "mixed": PlanExposure(visible=0.2, full=0.4, noised=0.4),
    "planned": PlanExposure(0.1, planned=0.6, noised=0.3, planning=PlanningConfig(3, 2, txt=1.4, img=1.2)),
}


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner's folder."""
    return make_planner_folder(tmp_path_factory.mktemp("planner"))


def make(wan: Path, planner: Path, train: list[Any], **more: Any) -> BankedCoTrainingModule:
    given = {"dropout": ConditionDropout(**OFTEN), "loss": CoTrainingLoss(ntp=0.3, visual=2.0, dit=1.5), **more}
    module = make_cotraining(wan, planner, train, BankedCoTrainingModule, **given)
    assert isinstance(module, BankedCoTrainingModule)
    return module


def bank_of(module: BankedCoTrainingModule) -> CoBank:
    """All of `SAMPLES`, each of which is in every batch."""
    stacks, first = [], 0
    for kind in KINDS:
        numbers = torch.arange(first, first + len(kind))
        stacks.append(CoStack(numbers, stack_of(module, kind) if kind[0].targets else None))
        first += len(kind)
    plans = join([write(sample, module.template) for sample in SAMPLES])
    return CoBank(tuple(stacks), tuple(map(len, KINDS)), plans)


def stack_of(module: BankedCoTrainingModule, samples: Sequence[Conversation]) -> Stack:
    task = samples[0].task
    texts = [renderer_text(task, sample.prompt) for sample in samples] + [renderer_text(task, "")]
    features = pad_sequence(module.features(texts, torch.device("cpu")), batch_first=True)
    columns = zip(*([m.media.pixels for m in [*s.sources, *s.targets]] for s in samples), strict=True)
    *sources, target = (module.codec.posterior(torch.stack(column)) for column in columns)
    return Stack(task, tuple(sources), target, features[:-1], features[-1])


def draws_of(module: BankedCoTrainingModule, one: CoTrainingPass, seeds: list[int]) -> tuple[list[Example], CoDraws]:
    """What the plain module draws for samples, laid out as a bank's."""

    def generator(*key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(draw_seed(*key) if len(key) > 1 else int(key[0]))

    rates = torch.tensor([getattr(module.dropout, coin) for coin in COINS])
    coins = torch.stack([torch.rand(4, generator=generator(seed)) < rates for seed in seeds])
    given = module.template, module.loss.ratios
    examples = [
        make_example(sample, *given, generator(seed), module.dropout, module.exposure)
        for sample, seed in zip(SAMPLES, seeds, strict=True)
    ]
    slots, width = one.plans._stack.targets.shape[1], module.planner.embedding.embedding_dim
    masked = torch.zeros(len(SAMPLES), slots, dtype=torch.bool)
    chosen, levels = torch.zeros(len(SAMPLES), dtype=torch.bool), torch.zeros(len(SAMPLES))
    values, noise = torch.zeros(2, len(SAMPLES), slots, width)
    planned, rank = torch.zeros_like(chosen), torch.full((len(SAMPLES), slots), slots)
    for number, (example, seed) in enumerate(zip(examples, seeds, strict=True)):
        first = (example.written.token_type == TARGET) & ~example.second
        masked[number, : int(first.sum())] = example.masked[first]
        chosen[number], levels[number] = example.kind != "visible", example.level
        count = int(first.sum())
        if example.kind in ("full", "noised"):
            values[number, :count] = torch.randn(count, width, generator=generator(seed, "plan"))
        elif example.kind == "planned":
            planned[number], rank[number, :count], noise[number, :count] = True, *order_of(module, seed, count, width)
    drawn = draw_noises(module.planner.vit_decoder, [e.masked for e in examples], [generator(s) for s in seeds])
    index = torch.zeros(len(drawn.index), masked.numel(), dtype=torch.long)
    flow = torch.zeros(*index.shape, width)
    index[:, masked.flatten()], flow[:, masked.flatten()] = drawn.index, drawn.noise
    plan = (planned, PlanDraws(rank, noise)) if module.exposure.planned else ()
    beside = Beside(chosen, levels, values, *plan) if module.exposure.visible < 1 else None
    return examples, CoDraws(coins, masked, Draws(index, flow), beside, noises_of(module, one, examples, seeds))


def order_of(module: BankedCoTrainingModule, seed: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """By token its place in the order of planning, and its noise, which goes to a step's tokens by position."""
    own, config = seed % 2**32, module.exposure.planning
    generator = torch.Generator().manual_seed(own)
    order, ranks, noises = reveal_order(count, own).flip(0), torch.empty(count).long(), torch.empty(count, width)
    ranks[order] = torch.arange(count)
    for tokens in order.split(reveal_counts(count, config.steps)):
        noises[tokens.sort().values] = torch.randn(len(tokens), width, generator=generator)
    return ranks, noises


def noises_of(
    module: BankedCoTrainingModule, one: CoTrainingPass, examples: list[Example], seeds: list[int]
) -> list[Noises]:
    """Noise levels and noises of both experts."""
    rendered = [e.renderer for e in examples if e.renderer is not None]
    own = [draw_seed(seed, "render") for seed in seeds[: len(rendered)]]
    hosts, generators = ([torch.Generator().manual_seed(seed) for seed in own] for _ in range(2))
    shapes = [
        [(module.codec.channels, *module.codec.posterior(m.pixels).shape[1:]) for m in s.media()] for s in rendered
    ]
    kept = [
        {id(m): torch.randn(shape, generator=g) for m, shape in zip(s.media(), shapes_of, strict=True)}
        for s, shapes_of, g in zip(rendered, shapes, generators, strict=True)
    ]
    found = []
    for render, expert in zip(one.renders, experts_of(module.expert).values(), strict=True):
        assert isinstance(render, StackedPass)
        sigmas = torch.tensor(module.noise.draw_sigmas([s.spec for s in rendered], expert, hosts))
        noise = [torch.randn(shapes_of[-1], generator=g) for shapes_of, g in zip(shapes, generators, strict=True)]
        groups: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group in render._groups:
            parts: tuple[list[Tensor], list[Tensor]] = ([], [])
            for number, posteriors in group.slots:
                stack = render._bank.stacks[number]
                place = [x is posteriors for x in (*stack.sources, stack.target)].index(True)
                first = sum(render._bank.counts[:number])
                for row in range(first, first + render._bank.counts[number]):
                    medium = [m.media for m in [*SAMPLES[row].sources, *SAMPLES[row].targets]][place]
                    shape = module.codec.channels, *posteriors.shape[2:]
                    parts[0].append(kept[row].get(id(medium), torch.full(shape, 9.0)))
                    parts[1].append(noise[row] if posteriors is stack.target else torch.full(shape, 9.0))
            for whole, part in zip(groups, parts, strict=True):
                whole.append(torch.stack(part))
        found.append(Noises(sigmas[render._sorted], *groups))
    return found


def gradients(module: BankedCoTrainingModule, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("exposure", EXPOSURES)
@pytest.mark.parametrize("train", [EVERY, ["connector_gen"], ["mllm", "flow_head"]], ids=" ".join)
def test_a_batch_has_the_losses_and_gradients_of_its_samples_packed(
    wan: Path, planner: Path, train: list[Any], exposure: str
) -> None:
    module = make(wan, planner, train, exposure=EXPOSURES[exposure])
    keys: list[tuple[str | int, ...]] = [("drawn", exposure, number) for number in range(len(SAMPLES))]
    one = module.make_pass(bank_of(module))
    examples, draws = draws_of(module, one, [draw_seed(module.seed, *key) for key in keys])
    if one._visual is False:
        draws = draws._replace(flow=None)
    kinds = {e.kind for e in examples if e.second.any()}
    assert kinds == {"visible": set(), "mixed": {"full", "noised"}, "planned": {"planned", "noised"}}[exposure]
    assert draws.coins[:, :4].any(0).all() and (draws.coins[:12, 0] & draws.coins[:12, 3]).any()

    loss, table = module.losses(SAMPLES, keys)
    means = table.means()
    sums = one.measure(ROWS, draws)
    found = dict(zip(SUMS, sums.sum(0), strict=True))
    counts = {"ntp": "labels", "visual": "hidden", "dit": "rendered", "answers": "asked", "accuracy": "labels"}
    for name, count in counts.items():
        if name in means:
            value = found["right" if name == "accuracy" else name] / found[count]
            torch.testing.assert_close(value, means[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert found[count] == 0
    assert {"dit", "ntp"} <= means.keys() and ("visual" in means) == (train != ["connector_gen"])
    torch.testing.assert_close(module.weigh(sums), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(module, module.weigh(sums)), gradients(module, loss), rtol=1e-5, atol=1e-5)


class Waiting(TorchDispatchMode):
    """Lists operations that wait for the device, or that bring something from the host, which no graph records."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in by):
            self.found.append(f"{name} by bool")
        if name == "lift_fresh" and args[0].dtype == torch.int64 and args[0].shape[1:] == (2,):
            return func(*args)  # lengths of samples, which stay on the host
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", [EVERY, ["connector_gen"]], ids=" ".join)
def test_nothing_waits_for_the_device_or_comes_from_the_host(
    wan: Path, planner: Path, train: list[Any], half: bool
) -> None:
    train = [part for part in train if part != "vit"]  # whose attention on the CPU is not that of a GPU
    module = make(wan, planner, train, exposure=PlanExposure(0.2, 0.3, 0.3, 0.2))
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        one = module.make_pass(bank_of(module))
        with Waiting() as mode:
            loss = module.weigh(one(ROWS))
    with mode:
        loss.backward()
    assert not mode.found
    with Waiting() as mode:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert {*mode.found} == {"lift_fresh", "index by bool", "_local_scalar_dense"}


def test_what_is_lost_and_shown_has_the_asked_rates(wan: Path, planner: Path) -> None:
    module = make(wan, planner, EVERY, exposure=EXPOSURES["mixed"])
    one = module.make_pass(bank_of(module))
    torch.manual_seed(0)
    draws = [one.draw(ROWS) for _ in range(150)]
    coins = torch.cat([d.coins for d in draws]).float()
    assert coins.mean(0).tolist() == pytest.approx(list(OFTEN.values()), abs=0.04)
    assert coins.T.corrcoef().triu(1).abs().max() < 0.06  # each is a coin of its own
    beside = [d.beside for d in draws if d.beside is not None]
    chosen, levels = torch.cat([b.chosen for b in beside]), torch.cat([b.levels for b in beside])
    assert chosen.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert not levels[~chosen].any() and 0.49 < levels.max() <= 0.5
    assert (levels > 0).float().mean().item() == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"recompute": "full"}, "no second forward"),
        ({"exposure": PlanExposure(visible=0.5, planned=0.5, planning=PlanningConfig(order="halton"))}, "random order"),
        ({"max_latent_frames": 2}, "latents of the length"),
    ],
)
def test_what_a_bank_cannot_do_is_refused(wan: Path, planner: Path, more: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be had from a bank\n.*{next(iter(more))}(.|\n)*{what}"):
        make(wan, planner, EVERY, **more)


# -- whole runs ---------------------------------------------------------------------------------------------------

STAGES = [
    {"train": ["connector_gen"], "until": 2},
    {"train": [part for part in EVERY if part != "vit"]},
]


def config(wan: Path, planner: Path, run: Path, steps: int, **data: Any) -> dict[str, Any]:
    """A run over all kinds of samples, with a stage that begins at its third step."""
    made = make_cotraining_config(wan, planner, run, steps, stages=STAGES, exposure={"visible": 0.5, "noised": 0.5})
    made["model"]["class_path"] = "bernini.cotraining.banked.BankedCoTrainingModule"
    made["data"]["class_path"] = "datamodules.toyworld.cotrain_bank.ToyCoTrainBankDataModule"
    tasks = {"t2i": 1, "rv2v": 1, "v2v/cot": 1, "und_img": 1}
    given = {"vae": str(wan), "text": str(wan), "tasks": tasks, "batch_size": 12, "length": 32, **data}
    made["data"]["init_args"] |= given
    return made


def test_a_resumed_fit_ends_where_an_unbroken_one_does(wan: Path, planner: Path, tmp_path: Path) -> None:
    def stored(name: str) -> dict[str, Any]:
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    whole = fit(config(wan, planner, tmp_path / "whole", 4))[0]["losses"]
    broken: list[float] = []
    moved = []
    before = build(config(wan, planner, tmp_path / "fresh", 4), tmp_path).state_dict()
    for steps in (1, 2, 4):
        given = config(wan, planner, tmp_path / "broken", steps, folder=str(tmp_path / "bank"))
        broken += fit(given, "--ckpt_path", "auto")[0]["losses"]
        after = stored("broken")["state_dict"]
        moved.append({name for name, x in after.items() if not torch.equal(x, before[name])})
        before = after
    assert len(whole) == 4 and broken == whole  # samples that were kept are those that were drawn
    first, second = stored("whole"), stored("broken")
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)
    states = (one["optimizer_states"][0]["state"] for one in (second, first))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert all(".proj_gen." in name for name in moved[0] | moved[1])
    parts = (".proj_gen.", ".pred_vit.", ".vit_decoder.", ".mask_tokens", ".language_model.", "transformer_2.")
    assert all(any(part in name for name in moved[2]) for part in parts)
    assert not any(".visual." in name for name in moved[2])

    rows = logged_rows(tmp_path / "whole")
    for row, own in zip(rows, ({"dit", "ntp"}, {"dit", "ntp"}, *([{"dit", "ntp", "visual"}] * 2)), strict=True):
        names = {name.removeprefix("train/") for name in row}
        assert names & {"dit", "ntp", "visual"} == own and {"dit_t2i", "dit_rv2v", "dit_v2v", "thoughts"} <= names
    assert {"val/loss", "val/dit_v2v", "val/plan_cosine"} <= logged_rows(tmp_path / "whole", "val")[0].keys()


def test_a_bank_is_refused_that_does_not_fit(
    wan: Path, planner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(code: int, **data: Any) -> str:
        given = write_config(tmp_path / "given.yaml", config(wan, planner, tmp_path, 1, **data))
        assert main(["fit", "-c", given]) == code
        return capsys.readouterr().err

    assert "no sample has a target" in refused(78, tasks={"und_img": 1})
    assert "kinds of samples in a batch of 2" in refused(78, batch_size=2)
    fit(config(wan, planner, tmp_path / "kept", 1, folder=str(tmp_path / "bank")))
    assert "holds other samples" in refused(77, folder=str(tmp_path / "bank"), length=36)
