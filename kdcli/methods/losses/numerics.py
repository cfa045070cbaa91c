"""Precision of the losses, and divisions by lengths that may be 0."""

import torch
from torch import Tensor


def precise(values: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's precision, at least float32; the teacher's side without gradient."""
    student = precise(student)
    return student, teacher.detach().to(student.dtype)


def divisor(lengths: Tensor, least: Tensor | float) -> Tensor:
    """The lengths to divide by: 1 in place of those up to `least`.

    A small ε in the denominator instead would give vectors of length 0 a gradient of size 1/ε.
    """
    return torch.where(lengths > least, lengths, 1)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, (B, D) → (B, D); one of length 0 stays 0."""
    return rows / divisor(torch.linalg.vector_norm(rows, dim=1, keepdim=True), 1e-12)
