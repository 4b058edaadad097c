"""Card numbers: told apart from other long numbers, so that none is kept where a name or an id belongs.

Whoever stores a card number must protect it by the rules of the card schemes (PCI DSS); this service stores none. One
that reached it by mistake, as an id or a customer's reference, is refused before anything is written.
"""

import re

from tallystick.errors import InvalidRequest

MESSAGE = (
    "It looks like a card number, and card numbers are not kept here. Send another id; if it is one of your own that"
    " only looks like it, put a letter directly before its first digit."
)

# The shortest that is refused has 13 digits; most ids have fewer characters and are done with here.
MIN_DIGITS = 13
# What every grouping below begins with. It finds nothing in almost all longer ids, and takes a third of the time.
_BEGINNING = re.compile(r"[0-9]{4}[0-9 -][0-9]{3}")
# As much of it as can be told from many texts at once.
_LONG_ENOUGH = re.compile(r"[0-9][0-9 -]{12}")

# Digits in one piece or grouped as on a card, with nothing that belongs to a longer word before or after: hexadecimal
# ids often hold 13 digits in a row, and groups as those of a UUID are none of a card. The lookahead lets a match begin
# inside another: "1234 4242 4242 4242 4242".
_GROUPED = re.compile(
    r"(?<![0-9A-Za-z])(?=("
    r"[0-9]{13,19}"
    r"|[0-9]{4}([ -])[0-9]{4}\2[0-9]{4}\2[0-9]{1,4}(?:\2[0-9]{1,3})?"  # 4-4-4-4, and up to 19 digits
    r"|3[0-9]{3}([ -])[0-9]{6}\3[0-9]{4,5}"  # American Express and Diners Club
    r")(?![0-9A-Za-z]))"
)

# Which first digits belong to a scheme, and how long its numbers are (ISO/IEC 7812; the schemes' published ranges).
# Without this one in ten of all long numbers would pass for a card.
_SCHEMES: tuple[tuple[range, frozenset[int]], ...] = (
    (range(4000, 5000), frozenset({13, 16, 19})),  # Visa
    (range(5100, 5600), frozenset({16})),  # Mastercard
    (range(2221, 2721), frozenset({16})),  # Mastercard
    (range(3400, 3500), frozenset({15})),  # American Express
    (range(3700, 3800), frozenset({15})),  # American Express
    (range(6011, 6012), frozenset(range(16, 20))),  # Discover
    (range(6440, 6600), frozenset(range(16, 20))),  # Discover
    (range(3000, 3060), frozenset(range(14, 20))),  # Diners Club
    (range(3600, 3700), frozenset(range(14, 20))),  # Diners Club
    (range(3800, 4000), frozenset(range(14, 20))),  # Diners Club
    (range(3528, 3590), frozenset(range(16, 20))),  # JCB
    (range(6200, 6300), frozenset(range(16, 20))),  # UnionPay
    *((range(first, first + 1), frozenset(range(13, 20))) for first in (5018, 5020, 5038, 5893, 6304, 6759)),  # Maestro
    (range(6761, 6764), frozenset(range(13, 20))),  # Maestro
)

_SEPARATORS = str.maketrans("", "", " -")


def may_hold_card_number(text: str) -> bool:
    """Whether so many digits follow each other that it is worth a closer look: quick, and for long texts too."""
    return _LONG_ENOUGH.search(text) is not None


def holds_card_number(text: str) -> bool:
    """Whether a card number stands in the text: 13 to 19 digits, in one piece or in groups parted by spaces or dashes.

    It must begin as a card scheme's numbers do, have their length, and end in the right check digit (Luhn).
    """
    if len(text) < MIN_DIGITS or _BEGINNING.search(text) is None:
        return False
    return any(_is_card_number(found[1].translate(_SEPARATORS)) for found in _GROUPED.finditer(text))


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
