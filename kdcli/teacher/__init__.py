"""Anything that gives logits to learn from: teachers of one or several models, live or from their cache."""

from kdcli.teacher.cache import CachedLogits
from kdcli.teacher.live import LiveTeacher
from kdcli.teacher.member import freeze
from kdcli.teacher.recorded import teachers_of
from kdcli.teacher.teacher import Teacher

__all__ = ["CachedLogits", "LiveTeacher", "Teacher", "freeze", "teachers_of"]
