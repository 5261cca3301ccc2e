"""What the verifier reads from an output; processes that read import this file."""

import numpy as np
import torch
from numpy.typing import NDArray

from bernini.conversation import Conversation
from datamodules.toyworld import judge

Record = dict[str, str | float]


def bare(item: Conversation) -> Conversation:
    """An item's name and truth, which is all that is read of it, without its pixels."""
    return Conversation(item.task, [], key=item.key, info={"truth": item.info["truth"]})


def read_output(item: Conversation, output: NDArray[np.uint8]) -> Record:
    """The verifier's scores of an output ``[3, T, H, W]``, behind the item's ``key``; see `judge`."""
    return {"key": item.key, **judge(item, torch.from_numpy(output))}
