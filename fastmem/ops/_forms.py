"""The forms of sharpening and the small number each of them takes."""

from fastmem import _check

FORMS = {"softmax": 1e-6, "power": 1e-16}


def resolve(form: str, eps: float | None, name: str = "eps") -> tuple[bool, float]:
    """Whether the form is the one in powers, and eps, or the form's own where it is None. Checks both.

    `name`: that of the argument eps.
    """
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if eps is None:
        eps = FORMS[form]
    check(eps, name)
    return form == "power", float(eps)


def check(eps: float, name: str = "eps") -> None:
    """Checks eps. With 0, weights of 0 would divide by it."""
    if not (_check.is_number(eps) and 0 < eps < float("inf")):
        raise ValueError(f"{name}: expected a finite number above 0, got {eps!r}")
