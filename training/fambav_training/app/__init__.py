"""The page to try a classifier in a browser."""
