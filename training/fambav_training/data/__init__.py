"""Images with labels: reading them, their pixels, batches of them and their augmentation."""
