"""Time and memory of models against each other: cases, their measurement, and the report."""
