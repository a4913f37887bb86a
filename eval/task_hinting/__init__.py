"""Evaluation of task hinting: scores by length, what attention looks at, what probes find."""

from .scores import area, by_length, error_kind, error_shares, falls_under, generated, teacher_forced

__all__ = ["area", "by_length", "error_kind", "error_shares", "falls_under", "generated", "teacher_forced"]
