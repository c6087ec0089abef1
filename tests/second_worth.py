"""Rounds with both kinds of device, written from PROTOCOL.md section 9.9 alone."""

from __future__ import annotations

import math


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def added_up(pool, updates):
    """Sum of weight * d, sum of weights, of their squares, of weight * |d|^2; updates are (weight, d)."""
    total, weights, squares, power = [0.0] * pool, 0.0, 0.0, 0.0
    for weight, change in updates:
        total = [t + weight * one for t, one in zip(total, change, strict=True)]
        weights, squares, power = weights + weight, squares + weight * weight, power + weight * dot(change, change)
    return {"sum": total, "u": weights, "uu": squares, "q": power, "n": len(updates)}


def remember(known, name, value):
    known[name + "_rounds"] += 1
    known[name] += (value - known[name]) / min(known[name + "_rounds"], 10)


def combination(pool, known, forward, first, scale):
    """What a round adds; `known` (noise, noise_rounds, agreement, agreement_rounds) learns from it."""
    z, f = added_up(pool, forward), added_up(pool, first)
    zz, ff, zf = dot(z["sum"], z["sum"]), dot(f["sum"], f["sum"]), dot(z["sum"], f["sum"])
    if f["n"] >= 2 and f["q"] > 0:
        q, p, c = f["q"] / f["u"], ff / (f["u"] * f["u"]), f["uu"] / (f["u"] * f["u"])
        if not known["noise_rounds"]:
            known["noise"] = 0.0
        remember(known, "noise", min(0.99, max(0.0, (q - p) / (1 - c) / q)))
    if f["n"] and z["n"] and ff > 0 and zz > 0:
        remember(known, "agreement", zf / math.sqrt(zz) / math.sqrt(ff))
    if not f["n"]:
        factor = {"mean": 1.0, "sqrt": math.sqrt(z["n"]), "sum": z["n"]}[scale]
        return [factor * one for one in z["sum"]]
    if not z["n"]:
        return f["sum"]
    g, nu = known["agreement"], known["noise"]
    if ff == 0:
        of_z, of_f = 1.0, 0.0
    elif zz == 0 or g <= 0:
        of_z, of_f = 0.0, 1.0
    else:
        c = f["uu"] / (f["u"] * f["u"])
        phi = nu * c / (1 - nu + nu * c)
        variance = (1 - phi) * max(0.0, (1 - phi) / (g * g) - 1)
        part = phi / (phi + variance) if phi > 0 else 0.0
        of_z = part * (1 - phi) / g * (math.sqrt(ff) / f["u"] / (math.sqrt(zz) / z["u"]))
        of_f = 1 - part
    return [of_z * a + of_f * b for a, b in zip(z["sum"], f["sum"], strict=True)]
