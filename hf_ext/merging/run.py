"""The merge of a config into a folder, for users."""

from __future__ import annotations

from ._base import MergeMethod, register_merge
from ._config import MergeConfig, ParentConfig
from ._merge import MergeResult, merge

__all__ = ["MergeConfig", "MergeMethod", "MergeResult", "ParentConfig", "merge", "register_merge"]
