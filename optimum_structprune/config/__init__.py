"""The configs: dataclasses of plain values that check their fields."""
