"""Drawing which patches of an image have become one token."""
