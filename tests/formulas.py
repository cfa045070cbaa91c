"""The papers' formulas in numpy, float64, in plain loops: what the losses are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def normal(*shape: int, seed: int, scale: float = 1.0) -> Array:
    return scale * np.random.default_rng(seed).normal(size=shape)


def log_softmax(row: Array) -> Array:
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def divergence(p: Array, q: Array) -> float:
    """KL of two distributions given as logarithms."""
    return float(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))


def instances(student: Array, teacher: Array, tau: float) -> float:
    rows = zip(student, teacher, strict=True)
    return tau**2 * float(np.mean([divergence(log_softmax(t / tau), log_softmax(s / tau)) for s, t in rows]))


def smoothed(student: Array, labels: Sequence[int], smoothing: float) -> float:
    each = []
    for row, label in zip(student, labels, strict=True):
        q = np.full(len(row), smoothing / len(row))
        q[label] += 1 - smoothing
        each.append(-(q * log_softmax(row)).sum())
    return float(np.mean(each))


def standardized(logits: Array) -> Array:
    return np.array([(row - row.mean()) / (row.std(ddof=1) + 1e-7) for row in logits])


def decoupled(
    student: Array, teacher: Array, labels: Sequence[int], tau: float, alpha: float, beta: float
) -> Array:
    """DKD of each sample, (B,)."""
    each = []
    for s, t, label in zip(student / tau, teacher / tau, labels, strict=True):
        binary, others = [], []
        for row in (s, t):
            rest = np.delete(row, label)
            log_p = log_softmax(row)
            log_others = math.log(np.exp(np.delete(log_p, label)).sum())
            binary.append(np.array([log_p[label], log_others]))
            others.append(log_softmax(rest))
        each.append(alpha * divergence(binary[1], binary[0]) + beta * divergence(others[1], others[0]))
    return tau**2 * np.array(each)


def dist(student: Array, teacher: Array, tau: float, inter: float, intra: float) -> float:
    s, t = (np.exp([log_softmax(row / tau) for row in side]) for side in (student, teacher))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)]
    return float(tau**2 * (inter * (1 - np.mean(rows)) + intra * (1 - np.mean(columns))))


def multi_level(student: Array, teacher: Array, taus: Sequence[float]) -> float:
    batch, classes = student.shape
    total = 0.0
    for tau in taus:
        s, t = (np.exp([log_softmax(row / tau) for row in side]) for side in (student, teacher))
        total += instances(student, teacher, tau)
        for i in range(batch):
            for j in range(batch):
                total += (t[i] @ t[j] - s[i] @ s[j]) ** 2 / batch
        for i in range(classes):
            for j in range(classes):
                total += (t[:, i] @ t[:, j] - s[:, i] @ s[:, j]) ** 2 / classes
    return float(total)


def pooled(maps: Array, height: int, width: int) -> Array:
    """Adaptive average pooling: cell i is the mean from ⌊i·H/h⌋ to ⌈(i + 1)·H/h⌉."""
    h, w = maps.shape[2:]
    out = np.zeros((*maps.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[:, :, i, j] = maps[:, :, rows, columns].mean(axis=(2, 3))
    return out


def same_size(student: Array, teacher: Array) -> tuple[Array, Array]:
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (2, 3))
    return pooled(student, height, width), pooled(teacher, height, width)


def hint(student: Array, teacher: Array) -> float:
    s, t = same_size(student, teacher)
    return float(np.mean((s - t) ** 2))


def attention(student: Array, teacher: Array) -> float:
    s, t = same_size(student, teacher)
    total, count = 0.0, 0
    for a, b in zip(s, t, strict=True):
        q = [(side**2).sum(axis=0).ravel() for side in (a, b)]
        total += ((q[0] / math.hypot(*q[0]) - q[1] / math.hypot(*q[1])) ** 2).sum()
        count += q[0].size
    return total / count


def variational(mean: Array, variance: Array, teacher: Array) -> float:
    mean, teacher = same_size(mean, teacher)
    each = [
        0.5 * ((mean[:, c] - teacher[:, c]) ** 2 / variance[c] + math.log(variance[c]))
        for c in range(len(variance))
    ]
    return float(np.mean(each))


def review(student: Array, teacher: Array) -> float:
    s, t = same_size(student, teacher)
    parts, weights = [float(np.mean((s - t) ** 2))], [1.0]
    for size in (4, 2, 1):
        if size < min(s.shape[2:]):
            parts.append(float(np.mean((pooled(s, size, size) - pooled(t, size, size)) ** 2)))
            weights.append(weights[-1] / 2)
    return float(np.dot(parts, weights) / sum(weights))


def similarity(student: Array, teacher: Array) -> float:
    sides = []
    for side in (student, teacher):
        flat = side.reshape(len(side), -1)
        products = np.array([[a @ b for b in flat] for a in flat])
        sides.append(np.array([row / np.sqrt((row**2).sum()) for row in products]))
    return float(((sides[0] - sides[1]) ** 2).sum() / len(student) ** 2)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def relational(student: Array, teacher: Array, distance_weight: float, angle_weight: float) -> float:
    batch = len(student)
    places = range(batch)
    distances, angles = [], []
    for side in (student.reshape(batch, -1), teacher.reshape(batch, -1)):
        lengths = np.array([[np.linalg.norm(a - b) for b in side] for a in side])
        distances.append(lengths / np.mean([lengths[i, j] for i in places for j in places if i != j]))
        cosines = np.zeros((batch, batch, batch))
        for i in places:
            for j in places:
                for k in places:
                    if lengths[i, j] > 0 and lengths[i, k] > 0:
                        inner = (side[j] - side[i]) @ (side[k] - side[i])
                        cosines[i, j, k] = inner / (lengths[i, j] * lengths[i, k])
        angles.append(cosines)
    distance = np.mean([huber(x) for x in (distances[0] - distances[1]).ravel()])
    angle = np.mean([huber(x) for x in (angles[0] - angles[1]).ravel()])
    return float(distance_weight * distance + angle_weight * angle)


def probabilistic(student: Array, teacher: Array) -> float:
    sides = []
    for side in (student, teacher):
        flat = side.reshape(len(side), -1)
        rows = np.array([row / np.sqrt((row**2).sum()) for row in flat])
        kernel = np.array([[(1 + a @ b) / 2 for b in rows] for a in rows])
        sides.append(np.array([row / row.sum() for row in kernel]))
    q, p = sides
    return float(np.mean(p * np.log((p + 1e-7) / (q + 1e-7))))


def contrastive(log_scores: Array, samples: int) -> float:
    noise = (log_scores.shape[1] - 1) / samples
    each = []
    for row in np.exp(log_scores):
        each.append(
            -math.log(row[0] / (row[0] + noise)) - sum(math.log(noise / (x + noise)) for x in row[1:])
        )
    return float(np.mean(each))


def convolved(maps: Array, weight: Array, bias: Array | None = None) -> Array:
    """A 1×1 convolution, weight (out, in, 1, 1)."""
    out = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], maps)
    return out if bias is None else out + bias[:, None, None]


def convolved3(maps: Array, weight: Array) -> Array:
    """A 3×3 convolution with padding 1, no bias."""
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = maps.shape[2:]
    out = np.zeros((len(maps), len(weight), height, width))
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("oc,bchw->bohw", weight[:, :, i, j], part)
    return out


def batch_normed(maps: Array, eps: float = 1e-5) -> Array:
    """By the batch's own statistics, before scale and shift."""
    mean, variance = maps.mean(axis=(0, 2, 3), keepdims=True), maps.var(axis=(0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(variance + eps)


def nearest(maps: Array, height: int, width: int) -> Array:
    rows = [i * maps.shape[2] // height for i in range(height)]
    columns = [j * maps.shape[3] // width for j in range(width)]
    return maps[:, :, rows][:, :, :, columns]
