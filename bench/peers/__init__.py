"""What others offer: each file holds the rivals of one op or of the whole model, written to be fast and readable."""
