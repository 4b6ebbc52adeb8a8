"""Tasks on anyio alone: carries out what core decides; the world is reached through ports.py."""
