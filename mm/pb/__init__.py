# Made by proto/generate.py: a package that only holds packages.
