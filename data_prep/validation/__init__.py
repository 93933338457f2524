"""Checks of a data set and the page that shows them."""
