"""What the renderer's text encoder is given."""

import html
import re

import ftfy

from bernini.tasks import get_task


def clean_prompt(text: str) -> str:
    """Mend encoding errors, unescape HTML twice and squeeze blanks, as Wan's pipeline does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def renderer_text(task: str, prompt: str) -> str:
    """The task's system sentence and the cleaned prompt, joined by nothing: the checkpoints' input format."""
    return get_task(task).sentence + clean_prompt(prompt)
