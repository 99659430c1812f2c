"""The figures of these tests are small."""

import pytest

from metrics import embedding


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """t-SNE of 800 points takes most of a second, of 120 next to nothing."""
    monkeypatch.setattr(embedding, "TOKENS", 60)
