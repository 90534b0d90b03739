"""The service without HTTP: requests in, outputs to whom they belong."""
