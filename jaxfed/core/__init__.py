"""The engine: clients, aggregation and the server as pure functions of arrays."""
