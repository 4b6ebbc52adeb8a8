"""Shipped fakes and example programs for testing mm and what is built on it."""
