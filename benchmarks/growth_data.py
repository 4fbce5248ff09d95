"""Physics that the networks of benchmarks/growth.py learn, computed on the spot."""

from __future__ import annotations

import numpy as np


def water_table(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Temperature and log pressure; logs of density, heat capacity and speed of sound (IAPWS-95, by CoolProp)."""
    from CoolProp.CoolProp import PropsSI

    rng = np.random.default_rng(0)
    t, p = rng.uniform(280, 1000, count), np.exp(rng.uniform(np.log(1e5), np.log(1e8), count))
    y = [np.log(PropsSI(name, "T", t, "P", p, "Water")) for name in ("D", "C", "A")]
    return np.stack([t, np.log(p)], 1), np.stack(y, 1)


def burgers_pairs(
    count: int, points: int, viscosity: float = 0.02, time: float = 1.0, steps: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """U at time 0 and later, of u_t + u u_x = ν u_xx with period 1, (count, points) each.

    Random smooth u; Fourier modes on twice as many points, with the products' upper third cut off, and fourth-order
    Runge-Kutta steps with viscosity as an integrating factor.
    """
    n = 2 * points
    rng, k = np.random.default_rng(0), 2 * np.pi * np.fft.rfftfreq(n, 1 / n)
    noise = rng.standard_normal((count, len(k))) + 1j * rng.standard_normal((count, len(k)))
    u = np.fft.rfft(np.fft.irfft(noise * np.exp(-0.5 * (k / (2 * np.pi * 2)) ** 2), n))
    u[:, 0] = 0
    u /= np.fft.irfft(u, n).std()
    start = np.fft.irfft(u, n)[:, ::2]
    h, kept = time / steps, k < 2 * np.pi * n / 3
    half = np.exp(-viscosity * k**2 * h / 2)

    def rate(u: np.ndarray) -> np.ndarray:
        return -0.5j * k * kept * np.fft.rfft(np.fft.irfft(u, n) ** 2)

    for _ in range(steps):
        a = rate(u)
        b = rate(half * (u + h / 2 * a))
        c = rate(half * u + h / 2 * b)
        d = rate(half**2 * u + h * half * c)
        u = half**2 * u + h / 6 * (half**2 * a + 2 * half * (b + c) + d)
    return start, np.fft.irfft(u, n)[:, ::2]
