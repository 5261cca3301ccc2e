"""How sources beyond the five trained ids are numbered in sampling."""

import pytest
import torch

from bernini.flow.guidance import Context
from bernini.renderer.experts import Experts
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render, source_ids


def test_up_to_five_sources_are_numbered_alike():
    for count in range(6):
        assert source_ids(count, "interpolate") == source_ids(count, "extend") == list(range(1, count + 1))


def test_more_sources_are_squeezed_or_go_on():
    assert source_ids(9, "interpolate") == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
    assert source_ids(9, "extend") == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("beyond_trained", ["interpolate", "extend"])
def test_the_model_is_given_the_ids_of_the_configuration(beyond_trained, tiny_model, randn):
    draw, model, seen = randn(0), tiny_model(0), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].segments[:, 4].tolist()))
    sources = [Source(draw(4, 1, 2, 2), is_video=False) for _ in range(7)]
    contexts = {Context("positive", False): draw(3, 12), Context("negative", False): draw(3, 12)}
    request = RenderRequest((4, 1, 2, 2), sources, contexts, "r2v_apg", seed=0)
    render(Experts(model, boundary=0.0), [request], SamplingConfig(steps=1, beyond_trained=beyond_trained))
    ids = torch.tensor([*source_ids(7, beyond_trained), 0]).tolist()
    assert seen == [[0, *ids, *ids]]  # without images, with images, with images and text
