"""Loss functions: pure, from tensors to a scalar, each its paper's formula.

All are float32, or float64 where the student's side is: half types are promoted first, so call them outside autocast,
whose matrix products would be bfloat16 again. No gradient reaches the teacher's side, and no value is waited for.
"""
