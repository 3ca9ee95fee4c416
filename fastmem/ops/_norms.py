"""The norms of content addressing and the small number each of them takes."""

NORMS = {"inner": 1e-6, "outer": 1e-6, "rsqrt": 1e-12, "clamp": 1e-8}


def resolve(norm: str, eps: float | None) -> float:
    """eps, or the norm's own where it is None. Checks both."""
    check(norm, eps)
    return NORMS[norm] if eps is None else float(eps)


def check(norm: str, eps: float | None) -> None:
    """Checks a norm and its eps."""
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if eps is not None and (not isinstance(eps, int | float) or not 0 <= eps < float("inf")):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
