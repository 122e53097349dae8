"""Reads numbers as people and models write them: separators, currency, decimals, powers of ten, fractions."""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_EXPONENT = 400
"""Largest power of ten that is read: beyond it, the exact number would have too many digits."""
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,4000})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]{{0,4000}})?|\.[0-9]{{1,4000}})"
NUMERAL = re.compile(rf"[+-]?{_DECIMAL}(?:[eE][+-]?[0-9]{{1,4}})?")
"""A number in digits: thousands separators at the right places, one point, an exponent."""
_RATIO = re.compile(rf"{NUMERAL.pattern}/[+-]?{_DECIMAL}")
_POWER = re.compile(
    r"(?:(?P<factor>[^a-z]+?)(?:\\times|\\cdot|×|·|\*))?10\^(?:\{(?P<braced>[+-]?[0-9]{1,4})\}|(?P<bare>[+-]?[0-9]{1,4}))"
)
_FRACTION = re.compile(r"(?P<sign>[+-]?)\\[dt]?frac\{(?P<over>[^{}]+)\}\{(?P<under>[^{}]+)\}")
_INTEGER = re.compile(rf"[+-]?{_DIGITS}")
_CURRENCY = re.compile(r"^([+-]?)(?:\\?\$|€|£|¥)([+-]?)")
_WITHIN = re.compile(r"[0-9A-Za-z.,/:^+\\-]")
_LABEL = re.compile(r"^(?:[A-Za-z]+[:,.]+)+")
_PART_OF_MORE = re.compile(r"(?:[\^_]\{?|\\[dt]?frac\{[^{}]*\}?\{?|\\sqrt(?:\[[^\]]*\])?\{?|[A-Za-z)}\]]_\{?)$")


def integer_of(text: str) -> int | None:
    r"""Return the integer that the text is, or None.

    As GSM8K's graders do, this drops thousands separators, a currency sign (`$`, `\$`) and a full stop at the end.
    """
    plain = _without_currency(text).removesuffix(".")
    return int(plain.replace(",", "")) if _INTEGER.fullmatch(plain) else None


def number_of(text: str) -> Fraction | None:
    r"""Return the exact number that the text is, or None if it is anything else, such as a sum.

    It may be an integer, a decimal, a ratio (`3/4`, `\frac{3}{4}`), or one with a power of ten (`1e-5`,
    `7.3 \times 10^{14}`), with thousands separators and a currency sign.
    """
    plain = "".join(_without_currency(text).split()).replace("−", "-").removesuffix(".")
    if NUMERAL.fullmatch(plain):
        return _decimal(plain)
    if _RATIO.fullmatch(plain):
        return _ratio(*plain.split("/"))
    if match := _FRACTION.fullmatch(plain):
        value = _ratio(match["over"], match["under"])
        return -value if value is not None and match["sign"] == "-" else value
    if match := _POWER.fullmatch(plain):
        factor = number_of(match["factor"]) if match["factor"] else Fraction(1)
        exponent = int(match["braced"] or match["bare"])
        return None if factor is None or abs(exponent) > _MAX_EXPONENT else factor * Fraction(10) ** exponent
    return None


def last_numeral(text: str) -> str | None:
    """Return the last number in the text, without separators, or None if there is none or it is part of more.

    `3/4` is one number, and so is `1.5e-6`. Nothing is cut out of `1.2.3`, `10:30`, `2024-01-05`,
    `10^{-5}`, `2 1/2` or `x2`.
    """
    text = text.replace("−", "-")
    digits = [index for index, character in enumerate(text) if character in "0123456789"]
    if not digits:
        return None
    start = end = digits[-1]
    while start > 0 and _WITHIN.match(text[start - 1]):
        start -= 1
    while end < len(text) and _WITHIN.match(text[end]):
        end += 1
    chunk = _LABEL.sub("", text[start:end].rstrip(".,:/^+\\-"))
    before = text[max(0, start - 80) : start]
    if _PART_OF_MORE.search(before) or ("/" in chunk and re.search(r"[0-9] $", before)):  # 2 1/2
        return None
    number = re.sub(r"(?<=[0-9.])(?:st|nd|rd|th|[A-Za-z]+)$", "", chunk)
    if not NUMERAL.fullmatch(number) and not _RATIO.fullmatch(number):
        return None
    sign = "-" if re.search(r"(?:^|[^0-9A-Za-z)\]}.])-\\?[$€£¥]$", before) else ""
    return sign + _written(number)


def _written(number: str) -> str:
    plain = number.replace(",", "").removesuffix(".")
    return re.sub(r"(^|[+/-])\.", r"\g<1>0.", plain)


def _without_currency(text: str) -> str:
    plain = text.strip()
    if len(plain) > 1 and plain.startswith("$") and plain.endswith("$"):
        plain = plain[1:-1].strip()  # math mode
    return _CURRENCY.sub(r"\1\2", plain).strip()


def _decimal(plain: str) -> Fraction | None:
    exponent = re.search(r"[eE]([+-]?[0-9]+)$", plain)
    if exponent and abs(int(exponent[1])) > _MAX_EXPONENT:
        return None
    return Fraction(plain.replace(",", ""))


def _ratio(over: str, under: str) -> Fraction | None:
    if not NUMERAL.fullmatch(over) or not NUMERAL.fullmatch(under):
        return None
    top, bottom = _decimal(over), _decimal(under)
    return None if top is None or not bottom else top / bottom
