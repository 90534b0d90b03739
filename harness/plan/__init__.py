"""What will be asked and when: fixed, with a digest, before the first request."""
