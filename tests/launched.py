"""Trains on two ranks, once per way to start workers; run by a launcher, as a user's own script would be.

python tests/launched.py SHARDS LOG START_METHOD ...
"""

import sys
from pathlib import Path


def main(shards: str, log: str, *start_methods: str) -> None:
    from recording import Recorder, make_trainer  # not above: workers that are spawned import this file

    from datamodules import VideoDataModule

    for start_method in start_methods:
        data = VideoDataModule(train=shards, batch_size=4, workers=2, start_method=start_method, seed=6)
        make_trainer(devices=2, strategy="ddp", max_epochs=1).fit(Recorder(Path(log) / start_method), data)


if __name__ == "__main__":
    main(*sys.argv[1:])
