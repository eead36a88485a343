"""A training run: its flags, the loop, what it optimises, and how it stops and resumes."""
