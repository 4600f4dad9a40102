"""All tasks by name, and names for several of them."""

from __future__ import annotations

from collections.abc import Sequence

from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.evaluate.tasks.multiple_choice import choices_tasks
from qvl_runtime.evaluate.tasks.others import boxes_tasks, captions_tasks, dialogues_tasks, scenes_tasks
from qvl_runtime.evaluate.tasks.questions import answers_tasks, documents_tasks
from qvl_runtime.evaluate.tasks.task import Task

_MADE = (captions_tasks, answers_tasks, documents_tasks, choices_tasks, boxes_tasks, dialogues_tasks, scenes_tasks)
TASKS: dict[str, Task] = {task.name: task for make in _MADE for task in make()}
GROUPS = {
    "captions": ("flickr", "nocaps"),
    "vqa": ("vqav2_val", "okvqa_val", "gqa_testdev", "vizwiz_val", "scienceqa_test_img"),
    "text": ("textvqa_val", "docvqa_val", "chartqa", "ai2diagram", "ocrvqa_test"),
    "refcoco_all": tuple(name for name in TASKS if name.startswith("refcoco")),
    "tests": tuple(name for name in TASKS if name in ("vqav2_testdev", "vizwiz_test", "docvqa_test", "grit_refexp")),
}


def chosen(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, groups expanded, each once. Raises `ConfigError` for a name that is neither."""
    found: dict[str, Task] = {}
    for name in names:
        group = GROUPS.get(name, (name,))
        for member in group:
            if member not in TASKS:
                near = [known for known in (*GROUPS, *TASKS) if known.startswith(member[:4])]
                hint = f" such as {', '.join(near[:6])}" if near else ""
                raise ConfigError(f"there is no task {quoted(member)}; expected one of `qvl evaluate --list`{hint}")
            found[member] = TASKS[member]
    return list(found.values())
