"""Card numbers: which texts hold one, and that other long numbers are left alone. All are published test numbers."""

import random
import uuid

import pytest

from tallystick.card_numbers import holds_card_number, may_hold_card_number, refuse_card_number
from tallystick.errors import InvalidRequest

# The digits of other alphabets, as keyboards of Asia and Arabia have them.
FULL_WIDTH = {ord("0") + digit: 0xFF10 + digit for digit in range(10)}
ARABIC = {ord("0") + digit: 0x0660 + digit for digit in range(10)}

CARDS = [
    "4242424242424242",  # Visa
    "4222222222222",
    "5555555555554444",  # Mastercard
    "2223003122003222",
    "378282246310005",  # American Express
    "6011111111111117",  # Discover
    "3056930009020004",  # Diners Club
    "36227206271667",
    "3566002020360505",  # JCB
    "6200000000000005",  # UnionPay
    "6205500000000000004",
    "2200000000000004",  # Mir
    "6074111111111111",  # RuPay
    "8111111111111112",
    "5019555544445555",  # Dankort
    "5061460410120225",  # Verve
    "5612559223580170",  # Maestro
    "6799990100000011",
    "5066990000000002",  # Elo
    "6362970000000458",
    "6062820000000003",  # Hipercard
    "9792030000000000",  # Troy
    "8600123456789012",  # Uzcard
    "9860123456789015",  # Humo
    "9704123456789015",  # Napas
]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_number_is_found_wherever_it_stands(card: str) -> None:
    for text in (card, f"card {card}", f"{card}.", f"order-{card}", f"pan={card}&x=1", f"12 {card} 34"):
        assert holds_card_number(text), text


@pytest.mark.parametrize(
    "text",
    [
        "4242 4242 4242 4242",
        "4242-4242-4242-4242",
        "pay 4242 4242 4242 4242 now",
        "1234 4242 4242 4242 4242",
        "6205 5000 0000 0000 004",
        "3782 822463 10005",
        "3782-822463-10005",
        "3622 720627 1667",
        "4242.4242.4242.4242",
        "4242_4242_4242_4242",
        "4242/4242/4242/4242",
        "4242 - 4242 - 4242 - 4242",
        "4242\u00a04242\u00a04242\u00a04242",
        "4242\u20134242\u20134242\u20134242",
        "order_4242_4242_4242_4242",
        "pan4242424242424242",
        "PAN4242 4242 4242 4242",
        "order-card4242424242424242",
        CARDS[0].translate(FULL_WIDTH),
        f"käse {CARDS[0].translate(ARABIC)}",
    ],
)
def test_a_card_number_is_found_in_groups(text: str) -> None:
    assert holds_card_number(text)


@pytest.mark.parametrize("card", CARDS)
def test_one_wrong_digit_makes_it_another_number(card: str) -> None:
    for place in range(4, len(card)):
        changed = f"{card[:place]}{(int(card[place]) + 1) % 10}{card[place + 1 :]}"
        assert not holds_card_number(changed), changed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "req-1",
        "424242424242",  # 12 digits
        "42424242424242424242",  # 20 digits
        "1234567812345670",  # the check digit is right, but no scheme has such numbers
        "u4242424242424242",
        "4242424242424242a",
        "4242 4242-4242 4242",
        "spanish4242424242424242",
        "20260131-1200-4242-4242",
        "2026_0131_1200_0042",
        "10.20.30.40:4242",
        "42-42-42-42-42-42-42-42",
        "2026-11-24T10:11:12.123456Z",
        "1795486859123",  # milliseconds, microseconds and nanoseconds since 1970
        "1795486859123456",
        "1795486859123456789",
    ],
)
def test_other_texts_are_left_alone(text: str) -> None:
    assert not holds_card_number(text)


def test_random_ids_with_letters_are_never_refused() -> None:
    numbers = random.Random(5)
    for _ in range(20_000):
        assert not holds_card_number(str(uuid.UUID(int=numbers.getrandbits(128), version=4)))
        assert not holds_card_number(numbers.randbytes(20).hex())


def test_ids_made_of_the_time_are_never_refused() -> None:
    """Those of now and of the next years: what docs/decisions/0015-card-numbers.md promises."""
    numbers = random.Random(5)
    begin, end = 1_790_000_000_000, 2_000_000_000_000
    for _ in range(5_000):
        at, counter = numbers.randrange(begin, end), numbers.randrange(2**22)
        for epoch in (1_288_834_974_657, 1_420_070_400_000):  # snowflakes of Twitter and Discord
            assert not holds_card_number(str((at - epoch) << 22 | counter))
        for text in (f"{at}", f"{at}{counter % 1000:03d}", f"{at}{counter % 10**6:06d}", f"{at}_{counter:07d}"):
            assert not holds_card_number(text), text


def test_one_in_27_of_random_numbers_with_16_digits_is_refused() -> None:
    numbers = random.Random(5)
    refused = sum(holds_card_number(f"{numbers.randrange(10**16):016d}") for _ in range(20_000))
    assert 1 / 30 < refused / 20_000 < 1 / 24  # docs/security.md says so


def test_many_texts_at_once_are_never_passed_over() -> None:
    for card in (
        *CARDS,
        "4242.4242.4242.4242",
        "4242\u20134242\u20134242\u20134242",
        CARDS[0].translate(FULL_WIDTH),
    ):
        assert may_hold_card_number(f"req-1 {card} acme")
    assert not may_hold_card_number("req-1234 customer-5678 acme ä")


def test_a_refusal_names_the_field_and_says_why() -> None:
    refuse_card_number("acme", "customer")
    with pytest.raises(InvalidRequest) as refused:
        refuse_card_number("4242 4242 4242 4242", "customer")
    assert (refused.value.status, refused.value.type, refused.value.field) == (422, "card-number", "customer")
    assert "4242" not in str(refused.value.body())
