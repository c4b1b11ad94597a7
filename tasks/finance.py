"""Checks on amounts of money."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

#: ISO 4217 currencies whose smallest unit is not a hundredth.
_MINOR_DIGITS = {
    **dict.fromkeys(("CLP", "ISK", "JPY", "KRW", "PYG", "UGX", "VND", "XAF", "XOF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}


def check_tax_rounding(job: RunningJob) -> dict[str, object]:
    """How far tax rounded line by line is from tax rounded once on the total, in the currency's smallest unit.

    Parameters: `currency` (ISO 4217), `tax_rate` (a share, "0.19"), `net_amounts`. Lines with more decimal places than
    the currency has are listed by position, since no invoice can show them.
    """
    given = Inputs(job.params)
    currency = given.text("currency")
    if not re.fullmatch(r"[A-Z]{3}", currency):
        raise given.error("currency", 'a currency code such as "EUR"')
    rate = given.decimal("tax_rate")
    if not 0 <= rate <= 1:
        raise given.error("tax_rate", 'a share from 0 to 1, such as "0.19"')
    amounts = given.decimals("net_amounts")
    digits = _MINOR_DIGITS.get(currency, 2)
    by_line = sum((_rounded(amount * rate, digits) for amount in amounts), Decimal(0))
    on_total = _rounded(sum(amounts, Decimal(0)) * rate, digits)
    return {
        "currency": currency,
        "net_total": str(sum(amounts, Decimal(0))),
        "tax_by_line": str(_rounded(by_line, digits)),
        "tax_on_total": str(on_total),
        "difference_minor_units": int((by_line - on_total).scaleb(digits)),
        "lines_too_precise": [index for index, amount in enumerate(amounts) if amount != _rounded(amount, digits)],
    }


def _rounded(amount: Decimal, digits: int) -> Decimal:
    return amount.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)
