"""Arms measured in turns, and what their blocks allow one to say."""
