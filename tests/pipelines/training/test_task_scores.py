"""Scores of a task: scenes are recognised as their own class, and as no other."""

from __future__ import annotations

import numpy as np
import torch

from lfm.synthetic.scenes import CLASS_NAMES, draw_scene
from lfm.types import Condition
from pipelines.training.measurement.task_scores import TASK_SCORES


def test_scenes_are_recognised_as_their_class_alone() -> None:
    scenes = [draw_scene(0, index, 64) for index in range(24)]
    images = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2)
    classes = torch.tensor([scene.class_index for scene in scenes])
    assert TASK_SCORES["scenes"](images, Condition(class_index=classes)).all()
    others = (classes + 1) % len(CLASS_NAMES)
    assert not TASK_SCORES["scenes"](images, Condition(class_index=others)).any()
    blank = torch.full_like(images, 128)
    assert not TASK_SCORES["scenes"](blank, Condition(class_index=classes)).any()
