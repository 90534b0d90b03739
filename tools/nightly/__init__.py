"""What the workflows run: two commits measured in turns, the branch of the history, issues and comments."""
