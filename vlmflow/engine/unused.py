"""What a job sets and none of its tasks reads: told and not refused, for one job file serves several commands."""

from __future__ import annotations

from vlmflow.config import Job, TaskName


def unused_settings(job: Job) -> tuple[str, ...]:
    """The keys of a job that say something to a task it does not have, as ``questions (of answer)``."""
    source, defaults = job.source, Job.model_fields
    read_by: dict[str, tuple[bool, TaskName]] = {
        "source.text_column": (source.text_column is not None, "match"),
        "source.questions_column": (source.questions_column is not None, "answer"),
        "questions": (bool(job.questions), "answer"),
        "policy": (job.policy is not None, "moderate"),
        **{f"models.{role}": (True, role) for role in job.models},
        "max_caption_tokens": (job.max_caption_tokens != defaults["max_caption_tokens"].default, "caption"),
        "num_beams": (job.num_beams != defaults["num_beams"].default, "caption"),
    }
    return tuple(f"{key} (of {task})" for key, (is_set, task) in read_by.items() if is_set and task not in job.tasks)
