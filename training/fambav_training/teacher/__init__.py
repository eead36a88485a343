"""What a teacher is: how it sees images, what it said of them, and an architecture to train one."""
