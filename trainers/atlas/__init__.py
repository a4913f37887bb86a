"""aTLAS: learned block scaling of task vectors (Zhang et al., 2024, arXiv 2407.02880)."""

from .blocks import BLOCKS, split_blocks
from .composer import Composer
from .task_vector import LowRank, TaskVector

__all__ = ["BLOCKS", "Composer", "LowRank", "TaskVector", "split_blocks"]
