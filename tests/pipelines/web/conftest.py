"""The browser of the tests of the page."""

from tests.support.browser import browser

__all__ = ["browser"]
