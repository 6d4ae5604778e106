"""Templates: format strings with a slot for each field of a task and one for the mask token."""

from __future__ import annotations

import string
from collections.abc import Sequence

from lit_spu.errors import UserError, did_you_mean


def check_template(template: str, fields: Sequence[str], where: str) -> None:
    """Check that a template has a slot for each field, and none for anything but fields and the mask token.

    Raises:
        UserError: if it does not. The message begins with `where`.
    """
    try:
        slots = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{where}: {template!r} is not a valid template: {error}.") from error
    for name, spec, conversion in slots:
        if name not in (*fields, "mask"):
            raise UserError(f"{where}: {{{name}}} is not a field. {did_you_mean(name, (*fields, 'mask'))}")
        if conversion or spec not in ("", "cut", "uncap"):
            raise UserError(f"{where}: {{{name}}} accepts only :cut or :uncap: {template!r}.")
    if missing := [name for name in fields if name not in {slot[0] for slot in slots}]:
        raise UserError(f"{where}: {{{missing[0]}}} is missing; a template needs all fields: {template!r}.")
