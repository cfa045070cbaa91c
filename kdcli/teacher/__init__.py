"""Teachers of one or several models: their logits, live or from the cache."""

from kdcli.teacher.cache import CachedLogits
from kdcli.teacher.member import freeze
from kdcli.teacher.teacher import LiveTeacher, Teacher
