"""The service: request -> contract -> strategy -> backend -> stream."""
