"""The harness and its verdicts held against servers and runs whose truth is known."""
