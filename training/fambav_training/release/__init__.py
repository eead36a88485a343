"""What a run leaves: the folder, its model card and its plot."""
