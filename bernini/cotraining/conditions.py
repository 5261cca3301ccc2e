"""Which conditions a training sample keeps, so that every arm of the full model's guidance is learned."""

from dataclasses import dataclass

import torch

from bernini.conversation import Conversation
from bernini.dropout import DropoutConfig, leave_out
from bernini.flow.guidance import Context


@dataclass(frozen=True)
class Conditions:
    """What is left of a sample.

    Attributes:
        planner: What the planner reads.
        renderer: Text and sources of the renderer.
        context: Which context of guidance the renderer's is.
    """

    planner: Conversation
    renderer: Conversation
    context: Context


@dataclass
class ConditionDropout(DropoutConfig):
    """Rates at which a sample loses a condition; each is a coin of its own. The paper gives none.

    Attributes:
        text: The renderer's text; the task's sentence stays. Without a plan the planner loses text and sources, too,
            as in the stream that guidance calls ``uncond``.
        image: All source images, of planner and renderer.
        video: All source clips, of planner and renderer.
        plan: The rows of the target in the renderer's context.
    """

    plan: float = 0.3

    def draw(self, sample: Conversation, generator: torch.Generator) -> Conditions:
        """Throw the four coins, and leave out what they say.

        Args:
            sample: A training sample; its targets stay.
            generator: On the CPU; it is drawn from once, whatever comes out.
        """
        rates = torch.tensor([self.text, self.image, self.video, self.plan])
        text, image, video, plan = (torch.rand(4, generator=generator) < rates).tolist()
        context = Context("negative" if text else "positive", plan=not plan)
        whole, nothing = leave_out(sample, False, image, video), leave_out(sample, True, True, True)
        return Conditions(nothing if text and plan else whole, leave_out(whole, text, False, False), context)


def everything(sample: Conversation) -> Conditions:
    """A sample that keeps all, as in validation."""
    return Conditions(sample, sample, Context("positive", plan=True))
