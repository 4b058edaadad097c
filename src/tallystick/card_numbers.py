"""Card numbers: told apart from other long numbers, so that none is kept where a name or an id belongs.

Whoever stores a card number must protect it by the rules of the card schemes (PCI DSS); this service stores none. One
that reached it by mistake, as an id or a customer's reference, is refused before anything is written.
"""

import re
import unicodedata

from tallystick.errors import InvalidRequest

MESSAGE = (
    "It looks like a card number, and card numbers are not kept here. Send another id; if it is one of your own that"
    " only looks like it, put a letter directly before its first digit."
)

# The shortest that is refused has 13 digits; most ids have fewer characters and are done with here.
MIN_DIGITS = 13

# What people and forms put between the groups.
_SEPARATORS = " ._/-"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # of which `_make_plain` makes the one above
# What every grouping below begins with. It finds nothing in almost all longer ids, and takes a tenth of the time.
_BEGINNING = re.compile(rf"[0-9]{{4}}[0-9{_SEPARATORS}]{{9}}")
# As much of it as is quickest told from many texts at once.
_LONG_ENOUGH = re.compile(rf"[0-9][0-9{_SEPARATORS}]{{12}}")
_LONG_ENOUGH_IN_ANY_ALPHABET = re.compile(rf"\d[\d\s{_DASHES}{_SEPARATORS}]{{12}}")

# Digits in one piece or grouped as on a card, with nothing that belongs to a longer word before or after, but for a
# word that says what it is: hexadecimal ids often hold 13 digits in a row, and groups as those of a UUID are none of a
# card. The lookahead lets a match begin inside another: "1234 4242 4242 4242 4242".
_GROUPED = re.compile(
    r"(?:(?<![0-9A-Za-z])|(?<![A-Za-z])(?i:pan|cc|card|cardno|cardnumber|visa|amex|mastercard))"
    r"(?=("
    r"[0-9]{13,19}"
    rf"|[0-9]{{4}}([{_SEPARATORS}]{{1,3}})[0-9]{{4}}\2[0-9]{{4}}\2[0-9]{{1,4}}(?:\2[0-9]{{1,3}})?"  # up to 19 digits
    rf"|3[0-9]{{3}}([{_SEPARATORS}]{{1,3}})[0-9]{{6}}\3[0-9]{{4,5}}"  # American Express and Diners Club
    r")(?![0-9A-Za-z]))"
)

# Which first digits belong to a scheme, and how long its numbers are (ISO/IEC 7812; the schemes' published ranges).
# Without this one in ten of all long numbers would pass for a card (docs/decisions/0015-card-numbers.md).
_SIXTEEN = frozenset({16})
_SCHEMES: tuple[tuple[range, frozenset[int]], ...] = (
    (range(4000, 5000), frozenset({13, 16, 19})),  # Visa; Elo and Dankort in part
    (range(5100, 5600), _SIXTEEN),  # Mastercard
    (range(2221, 2721), _SIXTEEN),  # Mastercard
    (range(3400, 3500), frozenset({15})),  # American Express
    (range(3700, 3800), frozenset({15})),  # American Express
    (range(6011, 6012), frozenset(range(16, 20))),  # Discover
    (range(6440, 6600), frozenset(range(16, 20))),  # Discover; RuPay, Verve, Elo and Troy in part
    (range(3000, 3060), frozenset(range(14, 20))),  # Diners Club
    (range(3600, 3700), frozenset(range(14, 20))),  # Diners Club
    (range(3800, 4000), frozenset(range(14, 20))),  # Diners Club; Hipercard in part
    (range(3528, 3590), frozenset(range(16, 20))),  # JCB
    (range(6200, 6300), frozenset(range(16, 20))),  # UnionPay
    *((range(first, first + 1), frozenset(range(13, 20))) for first in (5018, 5020, 5038, 5893, 6304, 6759)),  # Maestro
    (range(6761, 6764), frozenset(range(13, 20))),  # Maestro
    # Of 16 digits only, though some may be longer: ids of 17 to 19 digits made of the time begin with the same ones.
    (range(2200, 2206), _SIXTEEN),  # Mir, Borica
    (range(5000, 5100), _SIXTEEN),  # Maestro, Dankort 5019, Verve 506 and 507, Elo, RuPay 508
    (range(5600, 5900), _SIXTEEN),  # Maestro, Uzcard 5614
    (range(6000, 6200), _SIXTEEN),  # RuPay 60, Hipercard 6062, Maestro
    (range(6300, 6400), _SIXTEEN),  # Maestro, Elo 636, InstaPayment
    (range(6700, 6800), _SIXTEEN),  # Maestro
    (range(8100, 8300), _SIXTEEN),  # RuPay, UnionPay
    (range(8600, 8601), _SIXTEEN),  # Uzcard
    (range(9704, 9705), _SIXTEEN),  # Napas
    (range(9792, 9793), _SIXTEEN),  # Troy
    (range(9860, 9861), _SIXTEEN),  # Humo
)

_NO_DIGITS = re.compile(r"[^0-9]")


def may_hold_card_number(text: str) -> bool:
    """Whether so many digits follow each other that it is worth a closer look: quick, and for long texts too."""
    return (_LONG_ENOUGH if text.isascii() else _LONG_ENOUGH_IN_ANY_ALPHABET).search(text) is not None


def holds_card_number(text: str) -> bool:
    """Whether a card number stands in the text: 13 to 19 digits, in one piece or in groups parted by one separator.

    It must begin as a card scheme's numbers do, have their length, and end in the right check digit (Luhn).
    """
    if len(text) < MIN_DIGITS:
        return False
    plain = text if text.isascii() else _make_plain(text)
    if _BEGINNING.search(plain) is None:
        return False
    return any(_is_card_number(_NO_DIGITS.sub("", found[1])) for found in _GROUPED.finditer(plain))


def _make_plain(text: str) -> str:
    """The text with full-width and other alphabets' digits, spaces and dashes as ASCII ones."""
    return "".join(map(_make_character_plain, text))


def _make_character_plain(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return " " if character.isspace() else "-" if character in _DASHES else character


def refuse_card_number(text: str, field: str) -> None:
    """Raise `InvalidRequest` (422, `card-number`) that names the field, if a card number stands in it."""
    if holds_card_number(text):
        raise InvalidRequest(MESSAGE, field=field, type="card-number")


def _is_card_number(digits: str) -> bool:
    first = int(digits[:4])
    return any(first in begins and len(digits) in lengths for begins, lengths in _SCHEMES) and _is_luhn(digits)


def _is_luhn(digits: str) -> bool:
    # From the right, every second digit doubled, and its digits added (ISO/IEC 7812-1, annex B).
    ones = sum(int(digit) for digit in digits[::-2])
    twos = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (ones + twos) % 10 == 0
