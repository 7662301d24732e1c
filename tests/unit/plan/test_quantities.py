# SPDX-License-Identifier: Apache-2.0
import pytest

from hf_locmoe.plan.quantities import format_bytes, format_time, quantity


@pytest.mark.parametrize(
    "text, kind, expected",
    [
        ("200gbit", "rate", 25e9),
        ("200 Gbit/s", "rate", 25e9),
        ("25GB", "rate", 25e9),
        ("1e6", "rate", 1e6),
        ("80GiB", "bytes", 80 * 2**30),
        ("80gb", "bytes", 80e9),
        ("400T", "flops", 4e14),
        ("0.4PFLOPS", "flops", 4e14),
        ("10us", "seconds", 1e-5),
        ("2.5", "seconds", 2.5),
    ],
)
def test_units(text, kind, expected):
    assert quantity(text, kind, "field") == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("fast", "rate"),
        ("", "rate"),
        ("10us", "rate"),
        ("200gbit", "bytes"),
        ("-3", "flops"),
        ("0", "rate"),
        ("1.2.3", "rate"),
    ],
)
def test_what_is_no_quantity_is_named(text, kind):
    with pytest.raises(ValueError, match=r"`bandwidth` \(.*\) must be a positive number"):
        quantity(text, kind, "bandwidth")


def test_numbers_read_well():
    assert [format_bytes(number) for number in (12, 2.5e9, 1.25e13)] == ["12 B", "2.5 GB", "12.5 TB"]
    assert [format_time(number) for number in (5e-6, 0.25, 3.14159, 12345)] == ["5 us", "250 ms", "3.14 s", "12,345 s"]
