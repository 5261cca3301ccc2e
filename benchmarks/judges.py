"""The judge that the options of `bernini bench` name."""

from argparse import Namespace

from benchmarks.quality.judging.endpoint import EndpointConfig, EndpointJudge
from benchmarks.quality.judging.question import Judge
from bernini.errors import ConfigError


def check_judge(options: Namespace) -> None:
    """See that the options name one judge or none, before anything is made.

    Raises:
        ConfigError: They do not, or the judge's key or rubric is not there.
    """
    if options.judge_local is None:
        judge_of(options)
    elif not (options.judge_local / "config.json").is_file():
        raise ConfigError(f"there is no judge in {options.judge_local}", where="--judge-local", fix="download one")
    if options.rubric is not None and not options.rubric.is_file():
        raise ConfigError(f"there is no rubric {options.rubric}", where="--rubric", fix="leave it out for our own")


def judge_of(options: Namespace) -> Judge | None:
    """The judge, or none if none is named.

    Raises:
        ConfigError: Two are named, or half of one, or its key is not there.
        CheckpointError: A local one cannot be read.
    """
    remote = (options.judge_url, options.judge_model)
    if options.judge_local is not None:
        if any(remote):
            raise ConfigError("two judges are named", where="--judge-local, --judge-url", fix="name one")
        import torch

        from benchmarks.quality.judging.local import LocalJudge

        return LocalJudge(options.judge_local, device="cuda" if torch.cuda.is_available() else "cpu")
    if not any(remote):
        asked = (
            options.judge_revision,
            options.judge_key_env,
            options.cap,
            options.rubric,
            options.repeats is not None,
        )
        if any(asked):
            raise ConfigError(
                "no judge is named", why="options of a judge are", fix="add --judge-url and --judge-model"
            )
        return None
    if not all(remote):
        raise ConfigError(
            "half a judge is named", why="it takes --judge-url and --judge-model", fix="add the other one"
        )
    config = EndpointConfig(
        url=options.judge_url,
        model=options.judge_model,
        key_variable=options.judge_key_env,
        revision=options.judge_revision,
    )
    return EndpointJudge(config)
