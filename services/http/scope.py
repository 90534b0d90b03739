"""What modules of this folder leave in the ASGI scope for one another."""

REQUEST_ID = "lab.request_id"
"""The key in `scope["state"]` of the id that came with the request; absent where none did."""

ABORT = "lab.abort"
"""The extension in the scope whose "abort" drops the connection, with what is unsent; its "is_closing" tells
whether the client is gone."""
