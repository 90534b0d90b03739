"""The service without HTTP: requests become sequences, and each output goes to its request."""
