"""The judge that the options of `bernini bench` name."""

from argparse import Namespace

from benchmarks.quality.judge_config import JudgeConfig
from benchmarks.quality.judging.endpoint import EndpointConfig
from bernini.errors import ConfigError


def judge_of(options: Namespace) -> JudgeConfig | None:
    """The judge and how it is asked, or none if none is named.

    Raises:
        ConfigError: Two are named, or half of one.
    """
    remote = (options.judge_url, options.judge_model)
    how = {"repeats": options.repeats, "cap": options.cap, "rubric": str(options.rubric or "")}
    if options.judge_local is not None:
        if any(remote):
            raise ConfigError("two judges are named", where="--judge-local, --judge-url", fix="name one")
        return JudgeConfig(local=str(options.judge_local), **how)
    if not any(remote):
        if options.judge_revision or options.judge_key_env or any(value not in (None, "") for value in how.values()):
            raise ConfigError(
                "no judge is named", why="options of a judge are", fix="add --judge-url and --judge-model"
            )
        return None
    if not all(remote):
        raise ConfigError(
            "half a judge is named", why="it takes --judge-url and --judge-model", fix="add the other one"
        )
    endpoint = EndpointConfig(
        url=options.judge_url,
        model=options.judge_model,
        key_variable=options.judge_key_env,
        revision=options.judge_revision,
    )
    return JudgeConfig(endpoint, **how)
