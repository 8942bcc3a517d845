"""What ``cogtune infer`` samples, without a file in between."""

from __future__ import annotations

from cogtune.commands.infer.filling import fill_in
from cogtune.commands.infer.making import load_inputs, setup_of
from cogtune.commands.infer.request import InferRequest
from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.modeling.pipelines import Frames
from cogtune.modeling.video_sampler import VideoSampler


def first_of(recipe: SamplingConfig) -> Frames:
    """The frames of a request's first video."""
    row = recipe.rows[0]
    sampler = VideoSampler(setup_of(recipe), [row.prompt, recipe.negative_prompt])
    return sampler.sample(load_inputs(recipe, row, recipe.seeds[0], recipe.scales[0]))


def render_request(request: InferRequest) -> Frames:
    """The frames of the first video that is asked for."""
    return first_of(fill_in(request))
